"""What the commands share: argument types, and small helpers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .output import to_json


def _device_name(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r}; use auto, cpu, cuda or cuda:N")
    return value


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Local model directory (Hugging Face layout).")]
Device = Annotated[
    str, typer.Option(callback=_device_name, metavar="auto|cpu|cuda[:N]", help="Where to work (auto: on a GPU if any).")
]
ScaleExponent = Annotated[float, typer.Option(min=0, max=0.5, help="Exponent of the column scales.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
# typer reads these at run time, under Python 3.10 too, hence Optional.
MaybeBool = Optional[bool]  # noqa: UP045
MaybeText = Optional[str]  # noqa: UP045
MaybeInt = Optional[int]  # noqa: UP045
MaybeFloat = Optional[float]  # noqa: UP045
MaybePath = Optional[Path]  # noqa: UP045


def emit(json_output: bool, data: Any, text: str) -> None:
    """The result of a command on stdout."""
    typer.echo(to_json(data) if json_output else text)


def local_model(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a directory; only local model directories are read, nothing is ever downloaded"
        )
    return path


def text_file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    return path


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
