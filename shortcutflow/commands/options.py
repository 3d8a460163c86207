"""Options of every command that samples: which network, and how."""

from __future__ import annotations

from typing import Annotated

import typer

WHICH = "A run's or model's folder, a folder of runs (the newest is taken), or a hub id."
Place = Annotated[str, typer.Argument(help=WHICH)]
Weights = Annotated[
    str | None, typer.Option(help="An EMA's name, 'current', or a .safetensors file. [default: the run's]")
]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")]
Labels = Annotated[list[int] | None, typer.Option(help="A label a sample. [default: all in turn]")]
Device = Annotated[str | None, typer.Option(help="[default: a GPU if there is one]")]
