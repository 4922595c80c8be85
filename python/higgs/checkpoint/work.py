"""The state of an unfinished output directory: what makes quantizing resumable and keeps settings from mixing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ..report import Report
from .files import INDEX_FILE, WORK_FOLDER, Checkpoint, json_bytes, read_json, write_file

if TYPE_CHECKING:
    from ..energies import Energies

REPORT_FILE = "higgs_report.json"


class WorkFolder:
    """``OUT/.higgs``: ``settings.json``, one file per finished shard, the input energies in use, a lock."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / WORK_FOLDER

    @contextmanager
    def opened(self, settings: dict[str, str], *, force: bool) -> Iterator[WorkFolder]:
        """Holds the folder against other processes and checks the settings of what is there already.

        Raises ValueError if another process holds it, or for changed settings where shards were finished with the old
        ones. ``force`` starts over in any case.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with _lock(self.path / "lock", self.out):
            old = self._settings()
            if old != settings or force:
                if self._finished() and not force:
                    raise ValueError(_refusal(self.out, "was begun", old, settings))
                self._start_over()
                write_file(self.path / "settings.json", json_bytes(settings))
            yield self

    def _settings(self) -> dict[str, Any]:
        file = self.path / "settings.json"
        return read_json(file) if file.exists() else {}

    def _finished(self) -> list[Path]:
        return [p for p in self.path.glob("*.json") if p.name.startswith("shard-")]

    def _start_over(self) -> None:
        clear_output(self.out)
        for p in [*self._finished(), *self.path.glob("energies*"), *self.path.glob("*.tmp")]:
            p.unlink(missing_ok=True)
        for p in self.path.glob("sensitivities*"):
            shutil.rmtree(p) if p.is_dir() else p.unlink()

    @property
    def sensitivities(self) -> Path:
        """Where sensitivities that were measured for this output wait until it is complete."""
        return self.path / "sensitivities.json"

    def load_shard(self, name: str) -> dict[str, Any] | None:
        """What ``save_shard`` kept of a finished shard, or None if it is not finished."""
        record, file = self.path / f"shard-{name}.json", self.out / name
        if not record.exists() or not file.is_file():
            return None
        data = read_json(record)
        return data if data.get("bytes") == file.stat().st_size else None

    def save_shard(self, name: str, data: dict[str, Any]) -> None:
        write_file(self.path / f"shard-{name}.json", json_bytes({"bytes": (self.out / name).stat().st_size, **data}))

    def load_energies(self) -> tuple[Energies | None, str | None] | None:
        """The energies of the interrupted run and the note about them; None if it had not got that far.

        They are kept because gathering them again need not give the same bits (other thread count, other machine).
        """
        file = self.path / "energies.json"
        if not file.exists():
            return None
        data = read_json(file)
        if not data["used"]:
            return None, data["note"]
        from ..energies import Energies

        return Energies.load(self.path / "energies.safetensors"), data["note"]

    def save_energies(self, energies: Energies | None, note: str | None) -> None:
        if energies is not None:
            energies.save(self.path / "energies.safetensors")
        write_file(self.path / "energies.json", json_bytes({"used": energies is not None, "note": note}))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def _lock(file: Path, out: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with file.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {out}") from None
        yield


def _refusal(out: Path, verb: str, old: dict[str, str], new: dict[str, str]) -> str:
    changes = [
        f"  {key}: {old.get(key, 'not there')} -> {new.get(key, 'not there')}"
        for key in [*new, *(k for k in old if k not in new)]
        if old.get(key) != new.get(key)
    ]
    return f"{out} {verb} with other settings; use force to start over. Changed:\n" + "\n".join(changes)


def finished_report(out: Path, settings: dict[str, str], *, force: bool) -> Report | None:
    """The report of a finished output directory with the same settings; None if there is work to do.

    Raises ValueError if it was finished with other settings, or if ``out`` is a file or holds a model that did not come
    from here. With ``force`` only the latter two do.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ValueError(f"{out} exists and is not a directory")
    if (out / WORK_FOLDER).exists():
        return None
    if not (out / REPORT_FILE).exists():
        model = [
            p.name for p in sorted(out.iterdir()) if p.name == "config.json" or p.suffix in (".safetensors", ".bin")
        ]
        if model:
            raise ValueError(f"{out} holds another model ({model[0]}); choose an empty directory")
        return None
    if force:
        return None
    report, old = read_report(out)
    if old != settings:
        raise ValueError(_refusal(out, "was made", old, settings))
    try:
        Checkpoint(out)
    except (FormatError, OSError):  # files were lost since: make them again
        return None
    return report


def read_report(directory: Path) -> tuple[Report, dict[str, str]]:
    """The report and settings that a finished directory carries. Raises FormatError if they cannot be read."""
    data = read_json(directory / REPORT_FILE)
    try:
        return Report.from_dict(data), dict(data["settings"])
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"{directory / REPORT_FILE} is no report of higgs: {e!r}") from e


def clear_output(out: Path) -> None:
    """Removes the files of an earlier run: config.json first, so that what is left never looks complete."""
    for p in [
        out / "config.json",
        out / INDEX_FILE,
        out / REPORT_FILE,
        *out.glob("*.tmp"),
        *out.glob("model*.safetensors"),
    ]:
        p.unlink(missing_ok=True)
