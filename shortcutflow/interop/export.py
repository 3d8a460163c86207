"""From a model's or a run's folder to what other code reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

FORMATS: Mapping[str, tuple[str, ...]] = {
    "diffusers": ("weights", "decoder"), "onnx": ("weights", "steps", "guidance_scale", "decoder"),
    "torch": ("weights", "steps", "guidance_scale", "decoder"),
}  # fmt: skip
"""Formats and the options that each has: a diffusers pipeline, ONNX, torch.export."""


def export_model(
    folder: Path,
    out: Path,
    format: str,
    *,
    weights: str | None = None,
    steps: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    decoder: str | None = None,
) -> str:
    """Write a model in a format that other code reads; returns a summary in one line.

    Args:
        folder: a model folder or run folder.
        out: the file or folder, which must not exist.
        format: one of :data:`FORMATS`.
        weights: which of the folder's weights; None takes the config's.
        steps: one whole number, or step sizes that add up to 1; None is one step.
        guidance_scale: of classifier-free guidance; None is none.
        decoder: an autoencoder's folder or hub id, for models of latents.

    Raises:
        ValueError: for an unknown format, an option that it does not have, and as the format's own function.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    given: dict[str, Any] = {"weights": weights, "steps": steps, "guidance_scale": guidance_scale, "decoder": decoder}
    given = {name: value for name, value in given.items() if value is not None}
    if wrong := [name for name in given if name not in FORMATS[format]]:
        takes = ", ".join(FORMATS[format])
        raise ValueError(f"format {format!r} has no option {', '.join(wrong)}; its options: {takes}")
    if steps is not None and len(steps) == 1 and steps[0] == int(steps[0]):
        given["steps"] = int(steps[0])
    # Each loads packages that the others do not need.
    module, function = {
        "diffusers": ("exports.to_diffusers", "export_diffusers"),
        "onnx": ("exports.to_onnx", "export_onnx"),
        "torch": ("exports.to_program", "export_program"),
    }[format]
    return getattr(import_module(f"shortcutflow.interop.{module}"), function)(folder, out, **given)
