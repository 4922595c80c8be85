version: str
format_version: int
with_cuda: bool

class Grid:
    name: str
    p: int
    n_points: int
    index_bits: int
    t2: float
    rate: float
    points: list[list[float]]

def grids() -> list[Grid]: ...
def find_grid(name: str) -> Grid: ...
def grid_for_bits(bits: float) -> Grid: ...
def default_block(k: int) -> int: ...
def default_group(k: int, block: int) -> int: ...
def check_format(grid: str, n: int, k: int, block: int, group: int) -> tuple[int, int]: ...
def format_bits(grid: str, n: int, k: int, block: int, group: int, column_scale: bool) -> float: ...
def quantize(
    grid: str,
    n: int,
    k: int,
    block: int,
    group: int,
    seed: int,
    w: int,
    w_dtype: int,
    column_scale: int,
    indices: int,
    scales: int,
) -> float: ...
def dequantize(
    grid: str,
    n: int,
    k: int,
    block: int,
    group: int,
    seed: int,
    indices: int,
    scales: int,
    column_scale: int,
    out: int,
    out_dtype: int,
) -> None: ...
def linear(
    grid: str,
    n: int,
    k: int,
    block: int,
    group: int,
    seed: int,
    indices: int,
    scales: int,
    column_scale: int,
    x: int,
    x_dtype: int,
    rows: int,
    bias: int,
    y: int,
    y_dtype: int,
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
