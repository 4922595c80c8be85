"""How long-running functions report their progress; the library itself never prints."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives the progress of one task after another: ``start``, any number of ``advance``, ``finish``."""

    def start(self, description: str, total: float | None = None) -> None:
        """A task of ``total`` steps begins (None: unknown); an unfinished one before it counts as finished."""

    def advance(self, n: float = 1) -> None:
        """``n`` more steps are done."""

    def finish(self) -> None:
        """The task is over."""


class NullProgress:
    """Ignores everything: the default."""

    def start(self, description: str, total: float | None = None) -> None:
        pass

    def advance(self, n: float = 1) -> None:
        pass

    def finish(self) -> None:
        pass
