"""The command line `higgs`."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `higgs` script."""
    from .app import app

    app()


__all__ = ["main"]
