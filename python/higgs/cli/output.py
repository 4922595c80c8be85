"""How the command line talks: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

from ..errors import HiggsError
from ..progress import NullProgress, Progress

Command = TypeVar("Command", bound=Callable[..., None])
_LINE_SECONDS = 10.0


class BarProgress:
    """A bar with the time left, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichBars | None = None
        self._task: Any = None

    def start(self, description: str, total: float | None = None) -> None:
        self.finish()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bars = RichBars(*columns, console=self._console)
        self._task = self._bars.add_task(description, total=total)
        self._bars.start()

    def advance(self, n: float = 1) -> None:
        if self._bars is not None:
            self._bars.advance(self._task, n)

    def finish(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    abandon = finish


class LineProgress:
    """A plain line every few seconds, for logs and pipes."""

    def __init__(self, write: Callable[[str], None], seconds: float = _LINE_SECONDS) -> None:
        self._write, self._seconds = write, seconds
        self._description: str | None = None
        self._total: float | None = None
        self._done = self._begun = self._last = 0.0

    def start(self, description: str, total: float | None = None) -> None:
        self.finish()
        self._description, self._total, self._done = description, total, 0.0
        self._begun = self._last = time.monotonic()
        self._write(f"{description} ...")

    def advance(self, n: float = 1) -> None:
        self._done += n
        now = time.monotonic()
        if self._description is None or now - self._last < self._seconds:
            return
        self._last = now
        elapsed = now - self._begun
        if self._total:
            left = elapsed * max(self._total - self._done, 0) / max(self._done, 1e-9)
            share = f"{100 * self._done / self._total:.0f} %, {elapsed:.0f} s, {left:.0f} s left"
        else:
            share = f"{self._done:g}, {elapsed:.0f} s"
        self._write(f"{self._description}: {share}")

    def finish(self) -> None:
        if self._description is not None:
            self._write(f"{self._description}: done in {time.monotonic() - self._begun:.1f} s")
            self._description = None

    def abandon(self) -> None:
        self._description = None


def note(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def to_json(data: Any) -> str:
    """One JSON document; NaN and infinity, which JSON lacks, become null."""

    def plain(x: Any) -> Any:
        if is_dataclass(x) and not isinstance(x, type):
            x = asdict(x)
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [plain(v) for v in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return x if isinstance(x, str | int | float | bool | None) else str(x)

    return json.dumps(plain(data), indent=2, ensure_ascii=False)


@contextlib.contextmanager
def working(json_output: bool, *, quiet: bool = False) -> Iterator[Progress]:
    """Shows progress (a bar where stderr is a terminal; elsewhere lines, or nothing if ``quiet`` or a machine reads).

    While a machine waits for JSON, whatever a library prints goes to stderr.
    """
    progress: BarProgress | LineProgress | None = None
    if sys.stderr.isatty():
        progress = BarProgress(Console(stderr=True))
    elif not (json_output or quiet):
        progress = LineProgress(note)
    with contextlib.redirect_stdout(sys.stderr) if json_output else contextlib.nullcontext():
        try:
            yield progress or NullProgress()
        except BaseException:
            if progress is not None:
                progress.abandon()  # its last line would say "done"
            raise
        if progress is not None:
            progress.finish()


def describe(e: BaseException) -> str:
    """The message of an exception as the user should see it."""
    if isinstance(e, OSError) and e.strerror and e.filename:
        return f"{e.filename}: {e.strerror}"
    return str(e) or type(e).__name__


def guarded(command: Command) -> Command:
    """Expected errors become one message and exit code 1, Ctrl-C exit code 130; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except (HiggsError, ValueError, TypeError, OSError) as e:
            note(f"error: {describe(e)}")
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]
