"""How weights are stored, and the checks of tensors that every device shares."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from . import _core

_NEXT_SIGNS = 0x9E3779B97F4A7C15  # by which the seed grows from 64 signs to the next (FORMAT.md)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class LayerFormat:
    """How a weight matrix W[n, k] is stored (FORMAT.md). Made by :func:`layer_format`."""

    grid: str
    n: int
    k: int
    block: int
    group: int
    seed: int

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of indices of one row."""
        return core_format(self).row_bytes

    @cached_property
    def row_groups(self) -> int:
        """Scales of one row."""
        return core_format(self).row_groups

    def bits(self, column_scale: bool = False) -> float:
        """Effective bits per weight, scales (and column scale, if any) counted."""
        return core_format(self).bits(column_scale)

    def stored_bytes(self, column_scale: bool = False) -> int:
        return self.n * (self.row_bytes + 2 * self.row_groups) + (2 * self.k if column_scale else 0)

    def with_rows(self, n: int) -> LayerFormat:
        return replace(self, n=n)

    def with_columns(self, first: int, k: int) -> LayerFormat:
        """The format of columns ``first`` to ``first + k - 1``, a shard of tensor parallelism, whose bytes are a slice
        of this one's. The seed moves on to the signs of these columns and may become negative (it counts mod 2^64).

        Raises ValueError if the shard cuts a scale group in two or, in a trellis grid, runs.
        """
        grid, rest = _core.find_grid(self.grid), self.k - first - k
        step = math.lcm(self.group, grid.run_group or 1)
        tail = grid.run_group if grid.runs == 1 else 0  # less than that belongs to the run before it
        if first % step or (rest and (k % step or rest < tail)):
            raise ValueError(
                f"columns {first} to {first + k} of {self.k} cannot be split off: on grid {self.grid} with scale group "
                f"{self.group} (block {self.block}) a shard starts and ends at a multiple of {step} columns"
                + (f", {tail} or more before the end" if tail else "")
            )
        seed = self.seed + first // 64 * _NEXT_SIGNS
        return replace(self, k=k, seed=(seed + 2**63) % 2**64 - 2**63)  # the operators take signed 64 bits


@cache
def core_format(fmt: LayerFormat) -> _core.Format:
    """The C++ counterpart. Raises ValueError if the format is not legal."""
    return _core.Format(fmt.grid, fmt.n, fmt.k, fmt.block, fmt.group, fmt.seed % 2**64)


def layer_format(
    n: int, k: int, grid: str, *, block: int | None = None, group: int | None = None, seed: int = 0
) -> LayerFormat:
    """The format of an [n, k] matrix on ``grid``, with the default block and group where none is given.

    Raises ValueError for an unknown grid, k not a positive multiple of 64, or an illegal block or group.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} is not supported; use 0 to 2**63 - 1")
    block = _core.default_block(k) if block is None else block
    group = _core.default_group(k, block) if group is None else group
    fmt = LayerFormat(grid, n, k, block, group, seed)
    core_format(fmt)
    return fmt


def format_of(indices: Tensor, grid: str, block: int, group: int, seed: int) -> LayerFormat:
    """The format of packed ``indices`` [n, row_bytes]."""
    shape = indices.shape
    if len(shape) != 2:
        raise ValueError(f"indices has shape {list(shape)}, expected [n, row_bytes]")
    return _format_of_rows(*shape, grid, block, group, seed)


@cache  # the same object every time: what it computes of itself is computed once
def _format_of_rows(n: int, row_bytes: int, grid: str, block: int, group: int, seed: int) -> LayerFormat:
    g = _core.find_grid(grid)
    return LayerFormat(grid, n, row_bytes * 8 // g.index_bits * g.p, block, group, seed)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype], like: Tensor) -> None:
    """``tensor`` is on the device of ``like`` and has this shape and one of the dtypes."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, other tensors are on {like.device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; use {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_packed(indices: Tensor, scales: Tensor, column_scale: Tensor | None, fmt: LayerFormat) -> None:
    check("indices", indices, (fmt.n, fmt.row_bytes), (torch.uint8,), indices)
    check("scales", scales, (fmt.n, fmt.row_groups), (torch.float16,), indices)
    if not (indices.is_contiguous() and scales.is_contiguous()):
        raise ValueError("indices and scales must be contiguous")
    if column_scale is not None:
        check_column_scale(column_scale, fmt.k, indices)


def check_column_scale(column_scale: Tensor, k: int, like: Tensor) -> None:
    check("column_scale", column_scale, (k,), (torch.float16,), like)
    if not column_scale.is_contiguous():
        raise ValueError("column_scale must be contiguous")


def check_x(x: Tensor, k: int, like: Tensor) -> None:
    features = x.shape[-1] if x.dim() else "no"
    if features != k:
        raise ValueError(f"x has {features} features, the layer has in_features = {k}")
    check("x", x, x.shape, DTYPE_CODES, like)


def code_of(dtype: torch.dtype) -> int:
    """The dtype as ``_core`` knows it."""
    if dtype not in DTYPE_CODES:
        raise TypeError(f"dtype is {dtype}; use torch.float32, torch.float16 or torch.bfloat16")
    return DTYPE_CODES[dtype]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
