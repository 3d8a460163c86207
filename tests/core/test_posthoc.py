"""Averages made after training: what comes out is what would have been tracked, and snapshots survive on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import shortcutflow as sf
from shortcutflow import posthoc
from shortcutflow.ema import PowerFunctionEMAConfig, gamma_of
from shortcutflow.posthoc import (
    Snapshot,
    find_snapshots,
    posthoc_ema,
    profile_error,
    snapshot_file,
    solve_weights,
    write_snapshot,
)

STEPS, EVERY = 2048, 256
WIDTHS = (0.05, 0.10)


def path() -> Iterator[Tensor]:
    """Weights (32,) of step 1, 2, ...: a start that does not change, a drift that slows down, a walk, and noise."""
    generator = torch.Generator().manual_seed(0)
    start, drift, walked = torch.randn(32, generator=generator), torch.randn(32, generator=generator), torch.zeros(32)
    for step in range(1, STEPS + 1):
        walked = walked + 0.02 * torch.randn(32, generator=generator)
        yield 2 * start + drift * (step / STEPS) ** 0.5 + walked + 0.1 * torch.randn(32, generator=generator)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, dict[int, Tensor]]]:
    """A run's folder with snapshots of two widths, and averages of many widths as they were tracked."""
    folder = tmp_path_factory.mktemp("run")
    tracked: dict[float, dict[int, Tensor]] = {}
    net = nn.Linear(32, 1, bias=False)
    averages = [sf.EMA(net, PowerFunctionEMAConfig(sigma_rel=s)) for s in (0.04, 0.05, 0.06, 0.08, 0.1, 0.12)]
    for step, value in enumerate(path()):
        net.weight.data.copy_(value[None])
        for average in averages:
            average.update(net, step)
            done, sigma_rel = step + 1, average.config.sigma_rel
            if done % EVERY == 0:
                tracked.setdefault(sigma_rel, {})[done] = average.network.weight[0].clone()
                if sigma_rel in WIDTHS:
                    write_snapshot(folder, f"w{sigma_rel:g}", done, sigma_rel, average.network.state_dict())
    return folder, tracked


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("step", [STEPS, STEPS - 2 * EVERY])
@pytest.mark.parametrize("sigma_rel", [0.04, 0.06, 0.08, 0.12])
def test_equals_what_was_tracked(
    trained: tuple[Path, dict[float, dict[int, Tensor]]], sigma_rel: float, step: int
) -> None:
    """To 0.1 %, and 0.3 % below the widths kept; the nearest snapshot, taken for it, is worse by five or more."""
    folder, tracked = trained
    snapshots, expected = find_snapshots(folder), tracked[sigma_rel][step]
    found = posthoc_ema(snapshots, sigma_rel=sigma_rel, step=step)["weight"][0]
    error = distance(found, expected)
    assert error < (3e-3 if sigma_rel == 0.04 else 1e-3)
    nearest = min((tracked[s][done] for s in WIDTHS for done in tracked[s]), key=lambda w: distance(w, expected))
    assert distance(nearest, expected) > 5 * error


@pytest.mark.parametrize("sigma_rel", WIDTHS)
@pytest.mark.parametrize("step", [EVERY, STEPS // 2, STEPS])
def test_a_snapshot_is_given_back(
    trained: tuple[Path, dict[float, dict[int, Tensor]]], sigma_rel: float, step: int
) -> None:
    """Asked for a snapshot's own width and step, its factor is 1, and only float16 lies between."""
    folder, tracked = trained
    snapshots = find_snapshots(folder)
    weights = solve_weights([s.step for s in snapshots], [s.sigma_rel for s in snapshots], step, sigma_rel)
    itself = [float(s.step == step and s.sigma_rel == sigma_rel) for s in snapshots]
    assert torch.allclose(weights, torch.tensor(itself, dtype=torch.float64), atol=1e-9)
    found = posthoc_ema(snapshots, sigma_rel=sigma_rel, step=step)["weight"][0]
    assert torch.equal(found, tracked[sigma_rel][step].half().float())


def test_weights_minimise_the_distance_of_profiles() -> None:
    """Measured on a fine grid: no change of the factors that keeps their sum comes nearer."""
    steps, widths, target, sigma_rel = [300, 700, 1000, 1000], [0.1, 0.05, 0.1, 0.2], 1000, 0.14
    x = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100

    def profile(t: int, width: float) -> Tensor:
        n = gamma_of(width) + 1
        return torch.where(x < t, n * (x / t) ** (n - 1) / t, torch.zeros_like(x))

    basis = torch.stack([profile(t, width) for t, width in zip(steps, widths, strict=True)])
    wanted = profile(target, sigma_rel)
    weights = solve_weights(steps, widths, target, sigma_rel)
    assert weights.dtype == torch.float64
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    best = float((weights @ basis - wanted).square().mean())
    for i, j in ((0, 1), (1, 2), (2, 3), (3, 0)):
        for change in (0.01, -0.01):
            other = weights.clone()
            other[i] += change
            other[j] -= change
            assert float((other @ basis - wanted).square().mean()) > best
    error = (best / float(wanted.square().mean())) ** 0.5
    assert profile_error(steps, widths, target, sigma_rel, weights) == pytest.approx(error, rel=1e-3)


def test_the_unit_of_steps_does_not_matter() -> None:
    few, many = ([k * unit for k in (1, 2, 4, 4)] for unit in (10, 10**6))
    widths = [0.05, 0.05, 0.05, 0.1]
    weights = solve_weights(few, widths, few[-1], 0.07)
    assert torch.allclose(weights, solve_weights(many, widths, many[-1], 0.07), rtol=1e-9)
    assert not torch.allclose(weights, solve_weights(few, widths, few[-1], 0.08), rtol=1e-2)


def test_a_snapshot_given_twice_counts_once() -> None:
    once = solve_weights([500, 1000, 1000], [0.05, 0.05, 0.1], 1000, 0.07)
    twice = solve_weights([500, 1000, 1000, 1000], [0.05, 0.05, 0.1, 0.1], 1000, 0.07)
    assert torch.allclose(twice[:2], once[:2], atol=1e-9)
    assert torch.allclose(twice[2:].sum(), once[2], atol=1e-9)


def test_what_stands_still_stays(tmp_path: Path) -> None:
    """Even where the snapshots fit badly."""
    still = torch.tensor([100.0, -0.5, 3.0])
    for step in (100, 200):
        write_snapshot(tmp_path, "ema", step, 0.05, {"w": still, "count": torch.tensor(step)})
    with pytest.warns(UserWarning, match="all of one width"):
        found = posthoc_ema(find_snapshots(tmp_path), sigma_rel=0.2, step=200)
    assert torch.allclose(found["w"], still, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "sigma_rel", "step", "advice"),
    [
        ([0], 0.1, STEPS, "only to .*all of one width"),
        ([0], 0.05, STEPS, None),
        ([0, 1], 0.07, STEPS, None),
        ([0, 1], 0.07, STEPS - EVERY // 2, f"choose a step that has snapshots, such as {STEPS - EVERY} or {STEPS}"),
        ([0, 1], 0.01, STEPS, r"a sigma_rel in their range, 0\.05 to 0\.1"),
    ],
    ids=["one_width", "its_own_width", "two_widths", "between_steps", "too_narrow"],
)
def test_poor_fits_are_told(
    trained: tuple[Path, dict[float, dict[int, Tensor]]],
    given: list[int],
    sigma_rel: float,
    step: int,
    advice: str | None,
) -> None:
    snapshots = [s for s in find_snapshots(trained[0]) if s.sigma_rel in [WIDTHS[i] for i in given]]
    if advice is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            posthoc_ema(snapshots, sigma_rel=sigma_rel, step=step)
    else:
        with pytest.warns(UserWarning, match=advice) as caught:
            posthoc_ema(snapshots, sigma_rel=sigma_rel, step=step)
        assert caught[0].filename == __file__, "the warning points at the caller"


def test_whole_numbers_come_from_the_nearest_snapshot(tmp_path: Path) -> None:
    for step, width in ((100, 0.05), (200, 0.05), (200, 0.1), (300, 0.05)):
        write_snapshot(tmp_path, f"w{width}", step, width, {"w": torch.ones(2), "count": torch.tensor(step)})
    found = posthoc_ema(find_snapshots(tmp_path), sigma_rel=0.05, step=200)
    assert found["count"].dtype == torch.int64
    assert int(found["count"]) == 200
    assert found["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([1.0, -3e-7, 6e4], torch.float16),
        ([1.0, 7e4], torch.float32),
        ([3e-6, -1e-5], torch.float32),
        ([0.0, 0.0], torch.float16),
        ([], torch.float32),
        ([float("nan"), 1.0], torch.float32),
    ],
    ids=["usual", "too_large", "too_small", "zero", "empty", "nan"],
)
def test_stored_in_half_only_where_that_loses_nothing(tmp_path: Path, values: list[float], stored: torch.dtype) -> None:
    tensor = torch.tensor(values)
    snapshot = write_snapshot(tmp_path, "ema", 1, 0.1, {"w": tensor})
    with posthoc.opened(snapshot.path, "") as file:
        assert file.get_tensor("w").dtype == stored
    found = posthoc_ema([snapshot], sigma_rel=0.1, step=1)["w"]
    largest = float(tensor.abs().max()) if values else 0.0
    assert torch.allclose(
        found, tensor, rtol=0, atol=2**-11 * largest if stored == torch.float16 else 0, equal_nan=True
    )


def test_snapshots_are_found_in_order(tmp_path: Path) -> None:
    assert find_snapshots(tmp_path) == []
    written = [
        write_snapshot(tmp_path, name, step, width, {"w": torch.ones(2)})
        for step in (1000, 20_000, 123_456_789)
        for name, width in (("narrow", 0.05), ("wide", 0.1))
    ]
    assert written[0].path == tmp_path / "averages" / "narrow" / "step_00001000.safetensors"
    assert written[0].path == snapshot_file(tmp_path, "narrow", 1000)
    assert find_snapshots(tmp_path) == written


def test_a_half_written_snapshot_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one that was there before stays whole."""
    first = write_snapshot(tmp_path, "ema", 10, 0.1, {"w": torch.ones(2)})

    def full_disk(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("shortcutflow.io.atomic.sync", full_disk)
    for step in (10, 20):
        with pytest.raises(OSError, match="no space"):
            write_snapshot(tmp_path, "ema", step, 0.1, {"w": torch.zeros(2)})
    assert find_snapshots(tmp_path) == [first]
    assert posthoc_ema([first], sigma_rel=0.1, step=10)["w"].tolist() == [1, 1]


def test_tied_tensors_are_both_kept(tmp_path: Path) -> None:
    shared = torch.full((3,), 1e5)
    found = posthoc_ema([write_snapshot(tmp_path, "ema", 1, 0.1, {"a": shared, "b": shared})], sigma_rel=0.1, step=1)
    assert found["a"].tolist() == found["b"].tolist() == [1e5] * 3


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no snapshots: train with .* 'power'"):
        posthoc_ema([], sigma_rel=0.1, step=10)
    snapshots = [write_snapshot(tmp_path, "ema", step, 0.1, {"w": torch.ones(2)}) for step in (10, 20)]
    for step in (9, 21):
        with pytest.raises(ValueError, match=f"between the first and last snapshot, 10 and 20; got {step}"):
            posthoc_ema(snapshots, sigma_rel=0.1, step=step)
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
        posthoc_ema(snapshots, sigma_rel=0.3, step=20)
    with pytest.raises(ValueError, match="1 steps, 2 widths"):
        solve_weights([10], [0.05, 0.1], 10, 0.1)
    with pytest.raises(ValueError, match="counted from 1, got 0"):
        solve_weights([0, 10], [0.05, 0.1], 10, 0.1)
    with pytest.raises(ValueError, match=r"at least 1 .*got 0"):
        write_snapshot(tmp_path, "ema", 0, 0.1, {})
    with pytest.raises(ValueError, match=r"between 0 and 0\.2887"):
        write_snapshot(tmp_path, "ema", 30, 0.5, {})
    assert find_snapshots(tmp_path) == snapshots


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({"v": torch.ones(2)}, "another network than the others; tensors: v, w"), ({"w": torch.ones(3)}, r"w is \(3,\)")],
    ids=["names", "shapes"],
)
def test_snapshots_of_different_networks_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    snapshots: list[Snapshot] = [
        write_snapshot(tmp_path, "a", 10, 0.1, {"w": torch.ones(2)}),
        write_snapshot(tmp_path, "b", 10, 0.05, tensors),
    ]
    with pytest.raises(ValueError, match=message):
        posthoc_ema(snapshots, sigma_rel=0.07, step=10)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = write_snapshot(tmp_path, "ema", 10, 0.1, {"w": torch.ones(2)}).path
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"step_00000010\.safetensors is no .*damaged .*delete it"):
        find_snapshots(tmp_path)
    save_file({"w": torch.ones(2)}, file, metadata={"step": "10"})
    with pytest.raises(ValueError, match=r"step_00000010\.safetensors is no snapshot.*'step': '10'"):
        find_snapshots(tmp_path)
    file.write_bytes(whole)
    assert len(find_snapshots(tmp_path)) == 1
