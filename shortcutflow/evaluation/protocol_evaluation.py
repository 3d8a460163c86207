"""The evaluation of a run when training ends: what ``shortcutflow evaluate`` measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from shortcutflow.config import EvaluationSettings, RunConfig
from shortcutflow.data.autoencoder import load_autoencoder
from shortcutflow.distributed import joined
from shortcutflow.evaluation.evaluate import OF_LATENTS, check_extractor, evaluate, open_reference
from shortcutflow.evaluation.features.protocols import WITHOUT_WEIGHTS, open_protocol
from shortcutflow.evaluation.metrics import WITH_REFERENCE, check_request
from shortcutflow.evaluation.real_images import DIGITS
from shortcutflow.evaluation.report import report_path
from shortcutflow.evaluation.sample_grid import sample_grid, save_image
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.models.model import Model
from shortcutflow.schedule import DEFAULT_STEPS

SAMPLES_FILE = "samples.png"
COLUMNS = 20
"""Samples in it for each number of steps."""


class ProtocolEvaluation(EvaluationSettings):
    """What ``shortcutflow evaluate`` measures when training ends; docs/evaluation.md describes protocols and metrics.

    Args:
        protocol: its name.
        metrics: their names.
        steps: numbers of steps of the sampler.
        samples: how many for each.
        guidance_scale: of the sampler.
        reference: what samples are compared with, as ``--reference``; None is the images of the training data.
        batch_size: samples at once.
        precision: of the network: "float32" or "bfloat16".
    """

    on_every_rank: ClassVar[bool] = True

    kind: Literal["protocol"] = "protocol"
    protocol: str = "clean-fid"
    metrics: tuple[str, ...] = ("fid",)
    steps: tuple[Annotated[int, Field(ge=1)], ...] = DEFAULT_STEPS
    samples: int = Field(default=50_000, ge=2)
    guidance_scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    reference: str | None = None
    batch_size: int = Field(default=250, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"

    def check(self, config: RunConfig) -> None:
        """Refuse an evaluation that cannot be made.

        Raises:
            ValueError, OSError, ImportError: as :func:`shortcutflow.evaluation.evaluate.evaluate`.
        """
        info, needs_reference = config.data.describe(), not WITH_REFERENCE.isdisjoint(self.metrics)
        check_request(self.steps, self.metrics, self.samples)
        if not info.is_picture:
            raise ValueError(
                f"evaluation.protocol {self.protocol!r} is of images, data of kind {config.data.kind!r} has samples of "
                f"shape {info.shape}: use evaluation=null"
            )
        if needs_reference and self.reference is None and info.vae is not None:
            raise ValueError(OF_LATENTS.format(name=config.name))
        if needs_reference and str(self.reference).endswith(".npz") and not Path(str(self.reference)).is_file():
            raise FileNotFoundError(
                f"there is no evaluation.reference {self.reference}: shortcutflow evaluate --make-stats IMAGES "
                f"--protocol {self.protocol} --out {self.reference} makes it of the real images, evaluation=null goes "
                "without"
            )
        scale = load_autoencoder(info.vae, expect=info.latents).downsampling if info.vae is not None else 1
        protocol, side = open_protocol(self.protocol), (info.shape[1] * scale, info.shape[2] * scale)
        check_extractor(side, info.num_classes, protocol, self.metrics)
        source = self.reference or (DIGITS if config.data.kind == "digits" else None)
        if needs_reference and source is not None:
            open_reference(source, protocol, self.metrics, side)

    def smoke(self) -> Self | None:
        """The same with hardly any samples; nothing where a network's weights would have to be fetched."""
        if self.protocol not in WITHOUT_WEIGHTS:
            return None
        return self.model_copy(update={"samples": 20, "steps": (1, 4)})

    def run(self, model: Model, config: RunConfig) -> Mapping[str, Any] | None:
        """Evaluate with all ranks; writes ``samples.png``, the first samples at each number of steps."""
        with joined(config.training.device) as world:
            sampler = Sampler(
                model, seed=config.seed, guidance_scale=self.guidance_scale, batch_size=self.batch_size,
                precision=self.precision,
            )  # fmt: skip
            report = evaluate(
                sampler, open_protocol(self.protocol, device=world.device), report_path(model.folder, self.protocol),
                steps=self.steps, metrics=self.metrics, samples=self.samples, reference=self.reference, world=world,
            )  # fmt: skip
            if world.is_main:
                grid = sample_grid(
                    model, steps=self.steps, count=COLUMNS, seed=config.seed, guidance_scale=self.guidance_scale
                )
                save_image(grid, model.folder / SAMPLES_FILE)
            return report
