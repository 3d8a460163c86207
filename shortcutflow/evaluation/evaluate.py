"""The quality of a network's samples by named protocols: from weights to one report of all budgets.

Several processes (``torchrun``) share the parts; they meet in a folder beside the report, where finished parts outlive
a kill. The first of them puts the parts together in their order, so the numbers depend neither on the number of
processes nor on who made which part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import shortcutflow
from shortcutflow.evaluation.clock import Clock
from shortcutflow.evaluation.distances.inception_score import require_scores
from shortcutflow.evaluation.features.protocols import EvaluationProtocol
from shortcutflow.evaluation.measures import check_metrics, measured, needs_features, needs_reference
from shortcutflow.evaluation.parts_on_disk import WORK, PartsFolder, cut, file_name, hash_of, held_by, merged, share_of
from shortcutflow.evaluation.pictures import DIGITS, Pictures, open_pictures
from shortcutflow.evaluation.probe import Probe, probe_picture
from shortcutflow.evaluation.published import CLEAN_FID, clean_fid_statistics
from shortcutflow.evaluation.reference import Reference, load_reference, make_reference, remove_reference
from shortcutflow.evaluation.report import BudgetRow, report_of, write_report
from shortcutflow.evaluation.samples import Sampler, images_are_there
from shortcutflow.evaluation.together import ALONE, Team
from shortcutflow.io.atomic import claim, require_ours
from shortcutflow.schedule import step_sizes


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        steps: the sampling budgets.
        metrics: names, see :data:`shortcutflow.evaluation.measures.METRICS`.
        samples: how many a budget.
        reference: an .npz file of statistics, pictures (shards, a folder, an archive, "digits"), or clean-fid's own
            statistics as "clean-fid:cifar10-train"; None takes the pictures that the subject was trained on.
        images: a folder to save the samples in, a folder a budget below it, or None.
        keep_features: leave the parts for further metrics of the same samples.
    """

    steps: tuple[int, ...] = (1, 2, 4, 128)
    metrics: tuple[str, ...] = ("fid",)
    samples: int = 50_000
    reference: str | Path | None = None
    images: Path | None = None
    keep_features: bool = False

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ValueError: saying what is wrong.
        """
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, got {self.samples}")
        check_metrics(self.metrics, self.samples)
        if not self.steps:
            raise ValueError("no sampling budget is asked for: give steps, such as 1 4 128")
        for steps in self.steps:
            step_sizes(steps)
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"a budget is asked for twice: {', '.join(map(str, self.steps))}")


def evaluate(
    sampler: Sampler, protocol: EvaluationProtocol, asked: Asked, out: Path, *, team: Team = ALONE
) -> dict[str, Any] | None:
    """Measure samples at every budget and write the report; all processes of a team call this together.

    The same call goes on after a stop, with the parts that are finished.

    Args:
        sampler: of what is evaluated.
        protocol: by which.
        asked: what to measure.
        out: the report's file.
        team: the processes that share the work.

    Returns:
        The report, in the process that leads; None in the others.

    Raises:
        ValueError, OSError, ImportError: for anything that is wrong or missing, before any sample is made, and for
            samples that are not finite.
    """
    asked.check()
    _check_place(out)
    clock = Clock()
    probe, width = _probe(sampler, protocol, asked.metrics)
    with clock.phase("reference"):
        reference = _reference(sampler, protocol, asked, out, team, probe)
    if reference is not None and len(reference.real.statistics.mu) != width:
        raise ValueError(
            f"the reference {reference.record.pictures} has {len(reference.real.statistics.mu)} features, protocol "
            f"{protocol.name} has {width}: it was made by another protocol"
        )
    folders = {steps: parts_folder(sampler, protocol, steps, out, probe) for steps in asked.steps}
    parts = cut(asked.samples)
    with held_by(team, folders.values()):
        with clock.phase("parts"):
            _make_parts(sampler, protocol, folders, share_of(team.rank, parts), asked.images, team)
        with clock.phase("waiting"):
            team.wait()
        if not team.leads:
            return None
        rows = [_row(sampler, asked, steps, folder, parts, reference, clock) for steps, folder in folders.items()]
        whole = clock.whole()
        seconds = {"whole": whole, **clock.seconds, "own": whole - sum(clock.seconds.values())}
        report = report_of(
            sampler, protocol, reference, rows, samples=asked.samples, processes=team.rank.world_size, seconds=seconds
        )
        write_report(report, out)
        if not asked.keep_features:
            for folder in folders.values():
                folder.remove()
    return report


def _check_place(out: Path) -> None:
    if out.suffix != ".json":
        raise ValueError(f"the report is a .json file, got {out}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.absolute().parent} for the report")
    require_ours(out)


def _probe(sampler: Sampler, protocol: EvaluationProtocol, metrics: Sequence[str]) -> tuple[Probe, int]:
    """What the extractor sees in one picture of the samples' size, once an evaluation; and its number of features.

    Raises:
        ValueError: if a metric needs logits and the extractor gives none, or probabilities, or it does not take such
            pictures.
    """
    seen = protocol.extractor(probe_picture(sampler.side))
    if "is" in metrics:
        if seen.logits is None:
            raise ValueError(f"metric 'is' needs class scores, which protocol {protocol.name} does not give")
        require_scores(seen.logits)
    return Probe.seen(seen, sampler.side), seen.features.shape[1]


def parts_folder(sampler: Sampler, protocol: EvaluationProtocol, steps: int, out: Path, probe: Probe) -> PartsFolder:
    """Where the parts of a budget lie: another one for other samples, another extractor or another version."""
    key = sampler.key(steps) | {
        "protocol": protocol.name, "extractor": protocol.extractor.name, "version": shortcutflow.__version__,
    }  # fmt: skip
    return PartsFolder(out.parent / WORK, f"steps-{steps}", key, probe)


def _make_parts(
    sampler: Sampler,
    protocol: EvaluationProtocol,
    folders: dict[int, PartsFolder],
    share: list[range],
    images: Path | None,
    team: Team,
) -> None:
    """Make those of this process's parts that are not there, budget by budget."""
    places = {steps: images / f"steps-{steps}" if images is not None else None for steps in folders}
    if images is not None:
        claim(images)
    for place in places.values():
        if place is not None:
            place.mkdir(exist_ok=True)

    def is_done(steps: int, part: range) -> bool:
        place = places[steps]
        return folders[steps].holds(part) and (place is None or images_are_there(place, part))

    missing = [(steps, part) for steps in folders for part in share if not is_done(steps, part)]
    total, to_do = len(folders) * sum(map(len, share)), sum(len(part) for _, part in missing)
    with tqdm(total=total, initial=total - to_do, unit="sample", disable=not team.leads, mininterval=1) as bar:
        for steps, part in missing:
            bar.set_description(f"{steps} step{'s' * (steps > 1)}")
            folders[steps].make(part, sampler.part(steps, part, protocol.extractor, bar.update, places[steps]))


def _row(
    sampler: Sampler,
    asked: Asked,
    steps: int,
    folder: PartsFolder,
    parts: list[range],
    reference: Reference | None,
    clock: Clock,
) -> BudgetRow:
    own = Clock()
    with own.phase("merging"), clock.phase("merging"):
        keep = asked.samples if needs_features(asked.metrics) else 0
        made = merged(folder, parts, keep=keep, logits="is" in asked.metrics)
    with own.phase("distances"), clock.phase("distances"):
        real = reference.real if reference is not None else None
        values = measured(asked.metrics, made, real, sampler.subject.device)
    return BudgetRow(steps, values, made.seconds | own.seconds)


def _reference(
    sampler: Sampler, protocol: EvaluationProtocol, asked: Asked, out: Path, team: Team, probe: Probe
) -> Reference | None:
    """What to compare with; made of pictures first if need be, and kept beside the report."""
    if not needs_reference(asked.metrics):
        return None
    source, with_features = asked.reference, needs_features(asked.metrics)
    if source is None:
        pictures = pictures_of(sampler)
    elif str(source).startswith(CLEAN_FID):
        path = clean_fid_statistics(str(source).removeprefix(CLEAN_FID), protocol.name)
        return load_reference(path, protocol, with_features=with_features, name=str(source), probe=probe)
    elif Path(source).suffix == ".npz":
        return load_reference(Path(source), protocol, with_features=with_features, probe=probe)
    else:
        pictures = open_pictures(source)
    key = {"pictures": pictures.fingerprint(), "extractor": protocol.extractor.name}
    path = out.parent / f"reference-{file_name(protocol.name)}-{hash_of(key)}.npz"
    if team.leads:
        # One that is damaged, without features, or of an extractor that has changed since is made again. The leader
        # alone decides: processes that disagreed would wait for each other in different places.
        try:
            load_reference(path, protocol, with_features=with_features, probe=probe)
        except (OSError, ValueError):
            remove_reference(path)
    team.wait()
    kept = path.is_file()
    if not kept:
        make_reference(
            pictures, protocol, path, with_features=with_features, work=out.parent / WORK, team=team, side=sampler.side,
            probe=probe,
        )  # fmt: skip
    return replace(load_reference(path, protocol, with_features=with_features, probe=probe), kept=kept)


def pictures_of(sampler: Sampler) -> Pictures:
    """The pictures that a subject was trained on.

    Raises:
        ValueError: if they are not known, or were never kept, as with latents.
    """
    data, name = sampler.subject.data, sampler.subject.name
    if data is None:
        raise ValueError(f"nothing says what {name} was trained on: name pictures or their statistics with --reference")
    if sampler.autoencoder is not None:
        raise ValueError(
            f"{name} was trained on latents, and a reference is made of pictures: name those that they were made from, "
            "or their statistics, with --reference"
        )
    try:
        return open_pictures(DIGITS if data.kind == "digits" else data.opened())
    except NotImplementedError:
        raise ValueError(
            f"{name} was trained on data of kind {data.kind!r}, which is a stream and no folder of shards: name "
            "pictures or their statistics with --reference"
        ) from None
