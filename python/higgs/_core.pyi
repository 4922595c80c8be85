from collections.abc import Sequence
from typing import TypedDict

version: str
format_version: int
with_cuda: bool

class Grid:
    name: str
    p: int
    n_points: int
    index_bits: int
    window_bits: int
    family: str
    run_group: int
    runs: int
    t2: float
    rate: float
    points: list[list[float]]

class Format:
    row_bytes: int
    row_groups: int
    def __init__(self, grid: str, n: int, k: int, block: int, group: int, seed: int) -> None: ...
    def bits(self, column_scale: bool) -> float: ...

def grids() -> list[Grid]: ...
def find_grid(name: str) -> Grid: ...
def grid_for_bits(bits: float) -> Grid: ...
def default_block(k: int) -> int: ...
def default_group(k: int, block: int) -> int: ...
def quantize(fmt: Format, w: int, w_dtype: int, column_scale: int, indices: int, scales: int) -> float: ...
def dequantize(fmt: Format, indices: int, scales: int, column_scale: int, out: int, out_dtype: int) -> None: ...
def linear(
    fmt: Format, indices: int, scales: int, column_scale: int, x: int, dtype: int, rows: int, bias: int, y: int
) -> None: ...
def grouped_linear(
    fmt: Format,
    indices: int,
    scales: int,
    column_scale: int,
    x: int,
    dtype: int,
    rows: int,
    offsets: int,
    experts: int,
    y: int,
) -> None: ...
def rotate(data: int, dtype: int, rows: int, cols: int, block: int, seed: int, out: int) -> None: ...
def unrotate(data: int, rows: int, cols: int, block: int, seed: int, out: int) -> None: ...

class Allocation:
    choice: list[int]
    cost: int
    loss: float
    gap: float

def allocate(
    items: list[list[tuple[int, float]]],
    budget: int,
    *,
    group: list[int] = ...,
    fixed: list[int] = ...,
    max_states: int = ...,
) -> Allocation: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def supported_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...

class DeviceProperties(TypedDict):
    name: str
    sm: int
    multiprocessors: int
    shared_bytes_per_block: int

def cuda_device_count() -> int: ...
def cuda_current_device() -> DeviceProperties: ...
def cuda_tiled_bytes(fmt: Format) -> int: ...
def cuda_repack(fmt: Format, indices: int, scales: int, tiled: int, stream: int) -> None: ...
def cuda_unrepack(fmt: Format, tiled: int, indices: int, scales: int, stream: int) -> None: ...
def cuda_quantize(
    fmt: Format,
    w: int,
    w_dtype: int,
    column_scale: int,
    indices: int,
    scales: int,
    row_stats: int,
    stream: int,
) -> None: ...
def cuda_dequantize(
    fmt: Format, indices: int, scales: int, column_scale: int, out: int, out_dtype: int, stream: int
) -> None: ...
def cuda_dequantize_rotated(fmt: Format, indices: int, scales: int, out: int, out_dtype: int, stream: int) -> None: ...
def cuda_dequantize_rotated_tiled(
    fmt: Format, tiled: int, first_row: int, rows: int, out: int, out_dtype: int, stream: int
) -> None: ...
def cuda_input_vector(fmt: Format, column_scale: int, out: int, stream: int) -> None: ...
def cuda_rotate(
    data: int,
    dtype: int,
    rows: int,
    k: int,
    block: int,
    vector: int,
    out: int,
    out_dtype: int,
    stream: int,
) -> None: ...
def cuda_linear_max_rows(fmt: Format, dtype: int) -> int: ...
def cuda_linear_workspace_bytes(formats: Sequence[Format], rows: int, dtype: int) -> int: ...
def cuda_linear(
    formats: Sequence[Format],
    tiled: list[int],
    biases: list[int],
    ys: list[int],
    x: int,
    dtype: int,
    rows: int,
    input_vector: int,
    workspace: int,
    stream: int,
) -> None: ...
def cuda_plan(formats: Sequence[Format], rows: int, dtype: int) -> str: ...
def cuda_grouped_linear(
    fmt: Format,
    experts: int,
    tiled: int,
    x: int,
    dtype: int,
    rows: int,
    input_vector: int,
    offsets: int,
    y: int,
    workspace: int,
    stream: int,
) -> None: ...
def cuda_grouped_linear_max_rows(fmt: Format, experts: int, dtype: int) -> int: ...
def cuda_grouped_plan(fmt: Format, experts: int, rows: int, dtype: int) -> str: ...
