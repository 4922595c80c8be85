"""Reading and writing safetensors checkpoints tensor by tensor.

Headers are read by hand: a broken file gets an error that names the file and both sides, and a tensor is read into a
buffer of exactly its size (a memory map would count every page ever touched as memory of the process).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import FormatError, UnsupportedError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WORK_FOLDER = ".higgs"  # in an output directory that is not finished
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_COPY_BYTES = 4 << 20

# Bits per element of every dtype of the safetensors format. Only those in TORCH_DTYPES can be quantized.
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: ``nbytes`` bytes from byte ``start`` of the file ``shard``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor to be written looks like: safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BITS[self.dtype] // 8

    @classmethod
    def of(cls, dtype: torch.dtype, *shape: int) -> TensorSpec:
        return cls(_NAMES[dtype], shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FormatError that names the file if it is missing, no JSON or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} is missing") from None
    except (ValueError, RecursionError) as e:  # ValueError: also bad UTF-8, and numbers of thousands of digits
        raise FormatError(f"{path} is not JSON: {e}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


def _parse_entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(x) is int and x >= 0 for x in (*shape, begin, end)):
            raise ValueError("negative or no integer")
    except (TypeError, KeyError, ValueError) as e:
        raise FormatError(f"{path}: bad header entry of tensor {name}: {entry!r} ({e})") from None
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise FormatError(f"{path}: tensor {name} has dtype {dtype!r}, expected one of {', '.join(_DTYPE_BITS)}")
    expected = math.prod(shape) * _DTYPE_BITS[dtype] // 8
    if end - begin != expected:
        raise FormatError(
            f"{path}: tensor {name} ({dtype} {list(shape)}) takes {expected} bytes, its header gives it {end - begin}"
        )
    if end > data_bytes:
        raise FormatError(
            f"{path} is truncated: tensor {name} ends at byte {data_start + end}, "
            f"the file has {data_start + data_bytes} bytes"
        )
    return TensorEntry(name, dtype, shape, path.name, data_start + begin, expected)


def read_header(path: Path) -> tuple[list[TensorEntry], dict[str, str], str]:
    """The tensors of a safetensors file in the order of their bytes, its metadata, and the SHA-256 of the header.

    Raises FormatError, naming the file and both sides, for a truncated file, a header that is no safetensors header, or
    tensors that overlap, leave holes, or do not fill the file.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(f"{path} is truncated or no safetensors file: {size} bytes, header of {length} bytes")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        items = list(header.items())
        if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
            raise ValueError("__metadata__ does not map names to strings")
    except (ValueError, RecursionError, AttributeError, TypeError) as e:
        raise FormatError(f"{path}: the safetensors header is not a JSON object: {e}") from None
    data_start = 8 + length
    entries = [_parse_entry(path, name, entry, data_start, size - data_start) for name, entry in items]
    entries.sort(key=lambda e: (e.start, e.nbytes))
    position = data_start
    for tensor in entries:
        if tensor.start != position:
            raise FormatError(f"{path}: tensor {tensor.name} starts at byte {tensor.start}, expected {position}")
        position += tensor.nbytes
    if position != size:
        raise FormatError(f"{path}: the tensors end at byte {position}, the file has {size}")
    return entries, metadata, hashlib.sha256(raw).hexdigest()


class Checkpoint:
    """A Hugging Face model directory whose tensors are listed and checked, but not read.

    ``config`` is config.json, ``shards`` the weight files in order, ``tensors`` maps every tensor name to its entry.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises OSError if ``path`` is no directory, FormatError if its files contradict each other or themselves."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{path} is not a directory; only local model directories are read, nothing is ever downloaded"
            )
        if (self.path / WORK_FOLDER).is_dir() and not (self.path / "config.json").exists():
            raise FormatError(f"{path} is the unfinished output of `higgs quantize`; run that again to complete it")
        self.config = read_json(self.path / "config.json")
        self.shards, weight_map = self._find_shards()
        self.tensors: dict[str, TensorEntry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._header_hashes: dict[str, str] = {}
        for shard in self.shards:
            self._add_shard(shard)
        for name, shard in weight_map.items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise FormatError(f"{self.path / INDEX_FILE} says that {shard} holds tensor {name}, but it does not")

    def _find_shards(self) -> tuple[list[str], dict[str, str]]:
        if (self.path / SINGLE_FILE).is_file():
            return [SINGLE_FILE], {}
        index = self.path / INDEX_FILE
        if not index.is_file():
            if any(self.path.glob("*.bin")):
                raise UnsupportedError(f"{self.path} holds PyTorch .bin weights; convert them to safetensors first")
            raise FormatError(f"{self.path} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index} has no weight_map")
        shards = sorted(set(map(str, weight_map.values())))
        for shard in shards:
            if Path(shard).name != shard:  # would read outside the directory
                raise FormatError(f"{index} names the shard {shard!r}, expected a plain file name")
            if not (self.path / shard).is_file():
                count = sum(s == shard for s in weight_map.values())
                raise FormatError(f"{self.path / shard} is missing: {INDEX_FILE} says that it holds {count} tensors")
        return shards, weight_map

    def _add_shard(self, shard: str) -> None:
        entries, self.metadata[shard], self._header_hashes[shard] = read_header(self.path / shard)
        for e in entries:
            if e.name in self.tensors:
                raise FormatError(f"tensor {e.name} is in both {self.tensors[e.name].shard} and {shard} of {self.path}")
            self.tensors[e.name] = e

    def fingerprint(self) -> dict[str, str]:
        """Per weight file its size, time of last change and header hash; of config.json its hash."""
        result = {"config.json": hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()[:16]}
        for shard, header in self._header_hashes.items():
            stat = (self.path / shard).stat()
            result[shard] = f"{stat.st_size} bytes, changed {stat.st_mtime_ns}, header {header[:16]}"
        return result

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` (a float32, float16, bfloat16 or uint8 one) in memory of its own."""
        e = self.tensors[name]
        data = torch.empty(e.nbytes, dtype=torch.uint8)
        with self._open(e) as f:
            count = f.readinto(data.numpy())  # type: ignore[attr-defined]
        if count != e.nbytes:
            raise FormatError(f"{self.path / e.shard}: tensor {name} has {e.nbytes} bytes, only {count} could be read")
        return data.view(TORCH_DTYPES[e.dtype]).reshape(e.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of the tensor ``name``, a few MB at a time."""
        e = self.tensors[name]
        left = e.nbytes
        with self._open(e) as f:
            while left:
                chunk = f.read(min(left, _COPY_BYTES))
                if not chunk:
                    raise FormatError(f"{self.path / e.shard}: tensor {name} has {e.nbytes} bytes, {left} are missing")
                left -= len(chunk)
                yield chunk

    @contextmanager
    def _open(self, e: TensorEntry) -> Iterator[BinaryIO]:
        with (self.path / e.shard).open("rb") as f:
            f.seek(e.start)
            yield f


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of os.pwrite and friends do not say which file."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            raise OSError(e.errno, e.strerror or str(e), str(path)) from e
        raise


class ShardWriter:
    """A safetensors file of known layout whose tensors are written in any order, under ``PATH.tmp`` until finished."""

    def __init__(self, path: Path, specs: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
        """Creates the file in its full size, so that a full disk shows before any work is done."""
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        # Wide dtypes first: every tensor is then aligned to its element size, as readers that map the file need.
        order = sorted(specs, key=lambda name: (-_DTYPE_BITS[specs[name].dtype], name))
        header: dict[str, Any] = {"__metadata__": metadata}
        self._places: dict[str, tuple[int, int]] = {}
        position = 0
        for name in order:
            spec = specs[name]
            self._places[name] = (position, spec.nbytes)
            end = position + spec.nbytes
            header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end]}
            position = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._start, self.size = 8 + len(raw), 8 + len(raw) + position
        self._missing = set(order)
        with _named_errors(self.temporary):
            self._fd = os.open(self.temporary, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
            try:
                self._reserve()
                self._put(0, len(raw).to_bytes(8, "little") + raw)
            except BaseException:
                self.abort()
                raise

    def _reserve(self) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, self.size)
        else:
            os.ftruncate(self._fd, self.size)

    def _put(self, position: int, data: bytes) -> None:
        view = memoryview(data)
        while len(view):  # a write may stop short, at 2 GB for one
            count = os.pwrite(self._fd, view, position)
            position, view = position + count, view[count:]

    def write(self, name: str, data: Tensor | Iterable[bytes]) -> None:
        """Writes the tensor ``name``: a contiguous CPU tensor, or its bytes in pieces."""
        if isinstance(data, Tensor):
            raw: Any = data.detach().reshape(-1).view(torch.uint8).numpy() if data.numel() else b""
            data = [raw]
        position, nbytes = self._places[name]
        end = position
        with _named_errors(self.temporary):
            for piece in data:
                self._put(self._start + end, piece)
                end += len(piece)
        if end - position != nbytes:
            raise RuntimeError(f"tensor {name}: {end - position} bytes written, {nbytes} planned")
        self._missing.remove(name)

    def finish(self) -> None:
        """Makes the file durable and gives it its name."""
        if self._missing:
            raise RuntimeError(f"tensors not written: {sorted(self._missing)}")
        with _named_errors(self.temporary):
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        os.replace(self.temporary, self.path)
        sync_directory(self.path.parent)

    def abort(self) -> None:
        """Removes the unfinished file; does nothing after ``finish``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Makes renames in ``path`` durable (where the system can)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file at once: under a temporary name, made durable, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _named_errors(temporary), temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def json_bytes(data: Any) -> bytes:
    """The JSON text that is written everywhere: two spaces of indent, a newline at the end."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
