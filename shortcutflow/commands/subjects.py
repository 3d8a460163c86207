"""What commands share: networks as they name them (a run, a folder of runs, a model's folder, a hub id), and --out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcutflow.io.atomic import require_ours

if TYPE_CHECKING:
    import numpy as np

    from shortcutflow.evaluation.subject import Subject
    from shortcutflow.models.model import Model


def open_subject(place: str, weights: str | None, device: Any) -> Subject:
    """The network of a run's folder, of a folder of runs, of a model's folder, or of a hub id.

    Raises:
        FileNotFoundError, ValueError: see :func:`shortcutflow.run_dir.load_run` and
            :func:`shortcutflow.models.model.load`.
    """
    from shortcutflow.config import CONFIG_FILE
    from shortcutflow.evaluation.subject import subject_of_run
    from shortcutflow.models.config import ModelConfig, read_config
    from shortcutflow.models.model import is_hub_id, load
    from shortcutflow.run_dir import load_run

    folder = Path(place)
    is_model = (folder / CONFIG_FILE).is_file() and isinstance(read_config(folder), ModelConfig)
    if is_model or is_hub_id(place):
        return _subject_of_model(place, load(place, weights=weights, device=device), device)
    return subject_of_run(load_run(folder, weights=weights, device=device))


def _subject_of_model(place: str, model: Model, device: Any) -> Subject:
    from shortcutflow.data.autoencoder import weights_sha256
    from shortcutflow.data.source import DataInfo
    from shortcutflow.evaluation.subject import Subject

    config = model.config
    identity = {"network": config.backbone.model_dump(), "weights_sha256": weights_sha256(model.network.state_dict())}
    return Subject(
        name=Path(place).resolve().name if Path(place).is_dir() else place,
        network=model.network,
        info=DataInfo(config.shape, config.num_classes, config.condition_shape, config.vae, config.latents),
        device=device, identity=identity, weights=model.weights, step=config.step, finest_steps=config.finest_steps,
        null_y=config.null_y, flow_only=config.flow_only, sampler=config.sampler,
        folder=Path(place) if Path(place).is_dir() else None,
    )  # fmt: skip


def check_out(out: Path, suffixes: tuple[str, ...]) -> None:
    """Before any work: the file can be written, as what its name says."""
    if out.suffix.lower() not in suffixes:
        raise ValueError(f"--out must name a {' or '.join(suffixes)} file, got {out}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    require_ours(out)


def write_image(pixels: np.ndarray, out: Path, subject: Subject) -> None:
    """Write (h, w, 3) uint8 as a PNG, and print of which network it is."""
    from shortcutflow.evaluation.sample_grid import save_image

    save_image(pixels, out)
    step = "" if subject.step is None else f" at step {subject.step}"
    print(f"{out}: {subject.folder or subject.name}{step}, weights {subject.weights}")
