"""Post-hoc EMA: EMAs of any width made after training, from snapshots of power-function EMAs.

Karras et al. 2024 (arXiv 2312.02696), section 3.2: a snapshot is the weights of all steps times a known profile. A
combination of snapshots whose profiles add up to the wanted one is the EMA that would have been tracked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from shortcutflow.dtensor import is_sharded
from shortcutflow.ema import gamma_of
from shortcutflow.io.atomic import atomic_file, remove_leftovers
from shortcutflow.io.safetensors import opened

SNAPSHOTS = "averages"
"""The folder of a run that holds its snapshots."""
POOR_FIT = 0.1
"""A profile error (see ``profile_error``) above this is worth a warning."""
_PREFIX = "step_"
_REMEDY = "delete it, the others will do"


class Snapshot(NamedTuple):
    """One saved power-function EMA: file, name of the EMA, optimizer steps done and relative width."""

    path: Path
    name: str
    step: int
    sigma_rel: float


def snapshot_file(folder: Path, name: str, step: int) -> Path:
    """Where a run's folder holds the snapshot of this average at this step."""
    return folder / SNAPSHOTS / name / f"{_PREFIX}{step:08d}.safetensors"


def write_snapshot(folder: Path, name: str, step: int, sigma_rel: float, tensors: Mapping[str, Tensor]) -> Snapshot:
    """Write a snapshot into a run's folder; whatever interrupts it, a half-written one never counts as one.

    Args:
        folder: the run's.
        name: of the EMA.
        step: optimizer steps done, so the ``step`` of the EMA's last update + 1.
        sigma_rel: the EMA's relative width.
        tensors: whole tensors by name, such as the state of the EMA's network.

    Raises:
        ValueError: for a step below 1, an impossible width, or sharded tensors.
    """
    gamma_of(sigma_rel)
    if step < 1:
        raise ValueError(f"step must be at least 1 (optimizer steps done), got {step}")
    sharded = [key for key, tensor in tensors.items() if is_sharded(tensor)]
    if sharded:
        raise ValueError(f"{sharded[0]!r} is one process's shard of a tensor; gather it with full_tensor() first")
    final = snapshot_file(folder, name, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    header = {"sigma_rel": repr(sigma_rel), "step": str(step)}
    remove_leftovers(final.parent)
    with atomic_file(final) as unfinished:
        save_file({key: _compact(tensor) for key, tensor in tensors.items()}, unfinished, metadata=header)
    return Snapshot(final, name, step, sigma_rel)


def _compact(tensor: Tensor) -> Tensor:
    """In float16 where that rounds by at most 2^-11 of the largest value, else as it is.

    Half the size, and finer than bfloat16 by three bits; its narrower range is what the check is for: tensors with
    values above 65504, or with none above 6e-5, stay in full.
    """
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    half = tensor.to(torch.float16)
    fits = (half.to(tensor.dtype) - tensor).abs().max() <= 2**-11 * tensor.abs().max()
    return half if fits else tensor


def find_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a run's folder, by step and then by name; an empty list if it has none.

    Raises:
        ValueError: for a file that is damaged or is no snapshot.
    """
    found = []
    for path in (folder / SNAPSHOTS).glob(f"*/{_PREFIX}*.safetensors"):
        with opened(path, _REMEDY) as file:
            header = file.metadata() or {}
        try:
            found.append(Snapshot(path, path.parent.name, int(header["step"]), float(header["sigma_rel"])))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is no snapshot: its header has no step and sigma_rel but {header}; move it away"
            ) from error
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.name))


def posthoc_ema(snapshots: Sequence[Snapshot], *, sigma_rel: float, step: int) -> dict[str, Tensor]:
    """The power-function EMA of this width at this step, as if it had been tracked.

    One snapshot is read at a time, and summed in float32. Tensors that are not floating point come from the snapshot
    nearest in step. Running statistics (batch norm) are summed as well: find them anew where they matter.

    Args:
        snapshots: of one run. Best are two widths below and above sigma_rel, and a snapshot at ``step`` itself;
            those of later steps may be among them, and help.
        sigma_rel: the wanted width, in (0, 12^-0.5).
        step: optimizer steps done, no later than the last snapshot.

    Returns:
        float32 tensors by name; the others in their own type.

    Raises:
        ValueError: for no snapshots, a step outside their range, a wrong width, or snapshots of different networks.

    Warns:
        UserWarning: if the snapshots cannot make up the wanted profile; the result is then another EMA.
    """
    if not snapshots:
        raise ValueError(
            "there are no snapshots: train with an EMA of kind 'power' and snapshot_every above 0, better with "
            "two of different sigma_rel"
        )
    steps, widths = [s.step for s in snapshots], [s.sigma_rel for s in snapshots]
    if not min(steps) <= step <= max(steps):
        raise ValueError(
            f"step must lie between the first and last snapshot, {min(steps)} and {max(steps)}; got {step}"
        )
    weights = solve_weights(steps, widths, step, sigma_rel)
    _warn_of_poor_fit(steps, widths, step, sigma_rel, weights)
    nearest = min(snapshots, key=lambda s: abs(s.step - step))
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        with opened(snapshot.path, _REMEDY) as file:
            names = file.keys()
            if total and total.keys() != set(names):
                differing = ", ".join(sorted(total.keys() ^ set(names)))
                raise ValueError(f"{snapshot.path} is of another network than the others; tensors: {differing}")
            for name in names:
                _add(total, name, file.get_tensor(name), weight, snapshot, is_nearest=snapshot == nearest)
    return total


def _add(
    total: dict[str, Tensor], name: str, tensor: Tensor, weight: float, snapshot: Snapshot, *, is_nearest: bool
) -> None:
    if name in total and total[name].shape != tensor.shape:
        shapes = f"{tuple(tensor.shape)} instead of {tuple(total[name].shape)}"
        raise ValueError(f"{snapshot.path} is of another network than the others: {name} is {shapes}")
    if tensor.is_floating_point():
        # Through float64 the product is rounded once only; the sum stays float32.
        added = (tensor.double() * weight).float()
        total[name] = total[name].add_(added) if name in total else added
    elif is_nearest or name not in total:
        total[name] = tensor


def _warn_of_poor_fit(
    steps: Sequence[int], widths: Sequence[float], step: int, sigma_rel: float, weights: Tensor
) -> None:
    error = profile_error(steps, widths, step, sigma_rel, weights)
    if error <= POOR_FIT:
        return
    advice = []
    if len(set(widths)) < 2:
        advice.append("they are all of one width, two make up others far better")
    if step not in steps:
        near = sorted(set(steps), key=lambda s: abs(s - step))[:2]
        advice.append(f"choose a step that has snapshots, such as {' or '.join(map(str, sorted(near)))}")
    if not min(widths) <= sigma_rel <= max(widths):
        advice.append(f"a sigma_rel in their range, {min(widths):g} to {max(widths):g}, is nearer")
    advice.append("more snapshots help")
    warnings.warn(
        f"the {len(steps)} snapshots make up sigma_rel {sigma_rel:g} at step {step} only to {error:.0%} of its "
        f"profile: {'; '.join(advice)}",
        stacklevel=3,
    )


def solve_weights(
    steps: Sequence[int], sigma_rels: Sequence[float], target_step: int, target_sigma_rel: float
) -> Tensor:
    """The factors of the snapshots whose sum of profiles is nearest to the wanted one, in least squares.

    Algorithm 3 of the paper with one addition: the factors add up to 1. Without it a weight that hardly moves comes
    out too large or small by what they lack, per cents of it where the fit is poor; with it, it is its own EMA.

    Args:
        steps: of the snapshots, optimizer steps done.
        sigma_rels: of the snapshots, each in (0, 12^-0.5).
        target_step, target_sigma_rel: of the wanted EMA.

    Returns:
        (snapshots,) float64.

    Raises:
        ValueError: for no snapshots, lists of different lengths, or impossible steps or widths.
    """
    among, with_target, _ = _inner_products(steps, sigma_rels, target_step, target_sigma_rel)
    n = len(steps)
    # Lagrange's conditions of the least squares under the sum. lstsq, for a snapshot may be given twice.
    system = torch.ones(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[n, n] = among, 0
    right = torch.cat([with_target, with_target.new_ones(1)])
    return torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:n, 0]


def profile_error(
    steps: Sequence[int],
    sigma_rels: Sequence[float],
    target_step: int,
    target_sigma_rel: float,
    weights: Tensor,
) -> float:
    """How far these factors miss the wanted profile, as a fraction of its root mean square; 0 is exact.

    Arguments and errors as of ``solve_weights``, whose result ``weights`` is.
    """
    among, with_target, target = _inner_products(steps, sigma_rels, target_step, target_sigma_rel)
    squared = weights @ among @ weights - 2 * weights @ with_target + target
    return float((squared / target).clamp_min(0).sqrt())


def _inner_products(
    steps: Sequence[int], sigma_rels: Sequence[float], target_step: int, target_sigma_rel: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the snapshots' profiles with each other (n, n), with the wanted one (n,), and of that with itself ()."""
    if not steps or len(steps) != len(sigma_rels):
        raise ValueError(f"a step and a width a snapshot are needed, got {len(steps)} steps, {len(sigma_rels)} widths")
    if min(*steps, target_step) < 1:
        raise ValueError(f"steps are counted from 1, got {min(*steps, target_step)}")
    # In units of the target's step, so that the numbers are near 1 whatever the length of training.
    t = torch.tensor([*steps, target_step], dtype=torch.float64) / target_step
    gamma = torch.tensor([gamma_of(s) for s in (*sigma_rels, target_sigma_rel)], dtype=torch.float64)
    products = _inner_product(t[:, None], gamma[:, None], t[None], gamma[None])
    return products[:-1, :-1], products[:-1, -1], products[-1, -1]


def _inner_product(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """The integral of p_a p_b, where p(i) = (gamma + 1) i^gamma / t^(gamma + 1) up to t and 0 beyond.

    Equal profiles are equal EMAs: a tracked one weighs step i by the integral of p over [i - 1, i].
    """
    earlier, later = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    gamma_later = torch.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (earlier / later) ** gamma_later / ((gamma_a + gamma_b + 1) * later)
