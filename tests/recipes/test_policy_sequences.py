"""Push-T: the expert in the real environment, its demonstrations as samples, and a policy's way through an episode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.policy_sequences import evaluation, recipe
from recipes.policy_sequences.data import FEATURES, PushTData, actions_of, features, scaled_actions, windows
from recipes.policy_sequences.evaluation import FIRST_SEED, SOLVED, Episode, PolicyEvaluation
from recipes.policy_sequences.expert import Demonstration, Expert, demonstrate
from shortcutflow.data.manifest import Manifest
from shortcutflow.data.stream import ShardStream
from shortcutflow.evaluation.report import finish_report, table_of
from shortcutflow.launch import Options, run_recipe
from shortcutflow.models.config import config_of_run
from shortcutflow.models.model import Model


@pytest.fixture(scope="module")
def episodes() -> list[Demonstration]:
    return [demonstrate(seed) for seed in range(3)]


def test_the_expert_solves_episodes_it_was_not_tuned_on() -> None:
    assert [demonstrate(seed).success for seed in range(5000, 5006)] == [True] * 6


def test_demonstrations_are_a_function_of_the_seed(episodes: list[Demonstration]) -> None:
    again = demonstrate(0)
    assert np.array_equal(again.states, episodes[0].states)
    assert np.array_equal(again.actions, episodes[0].actions)
    undisturbed = demonstrate(0, disturbance=0)
    assert not np.array_equal(undisturbed.actions[:20], again.actions[:20])


def test_windows_are_what_was_seen_and_what_followed(episodes: list[Demonstration]) -> None:
    episode = episodes[1]
    samples = list(windows(episode, horizon=4, observed=2, name="e"))
    assert len(samples) == len(episode.actions)
    for i in (0, 7, len(samples) - 1):
        sample = samples[i]
        assert sample.data.shape == (4, 2)
        coming = episode.actions[[min(i + k, len(samples) - 1) for k in range(4)]]
        np.testing.assert_allclose(actions_of(sample.data, episode.states[i]), coming, atol=1e-3)
        assert isinstance(sample.y, np.ndarray)
        np.testing.assert_array_equal(sample.y, features(episode.states[[max(i - 1, 0), i]]))


def test_features_do_not_jump_where_the_angle_wraps() -> None:
    below, above = np.array([100.0, 200, 300, 250, 2 * np.pi - 1e-6]), np.array([100.0, 200, 300, 250, 1e-6])
    np.testing.assert_allclose(features(below), features(above), atol=1e-4)
    assert features(below).shape == (FEATURES,)


def test_pusher_and_actions_are_seen_in_the_blocks_frame() -> None:
    """Turning and moving table, block and pusher together changes where they are, not how they lie to each other."""
    state, target = np.array([300.0, 210, 280, 260, 0.3]), np.array([250.0, 240])
    turn, move = 0.8, np.array([10.0, -20])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    moved = np.concatenate([rotation @ state[:2] + move, rotation @ state[2:4] + move, [state[4] + turn]])
    np.testing.assert_allclose(features(state)[:2], features(moved)[:2], atol=1e-5)
    assert not np.allclose(features(state)[2:4], features(moved)[2:4], atol=1e-2), "the goal stays where it is"
    np.testing.assert_allclose(
        scaled_actions(target, state), scaled_actions(rotation @ target + move, moved), atol=1e-5
    )


def test_at_the_goal_nothing_is_left_to_do() -> None:
    at_goal = np.array([10.0, 20, 256, 256, np.pi / 4])
    np.testing.assert_allclose(features(at_goal)[2:9], [0, 0, 1, 0, 0, 0, 0], atol=1e-6)


def test_actions_stay_on_the_table() -> None:
    state = np.array([300.0, 210, 500, 10, 0])
    assert np.array_equal(actions_of(np.array([9.0, -9.0]), state), [512, 0])
    target = np.array([450.0, 60.0])
    np.testing.assert_allclose(actions_of(scaled_actions(target, state), state), target, atol=1e-3)


def test_prepare_once_and_refuse_other_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = PushTData(folder=tmp_path / "pusht", demonstrations=2)
    folder = data.prepare()
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert data.prepare() == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    manifest, info = Manifest.read(folder), data.describe()
    assert (manifest.shape, manifest.condition_shape) == (info.shape, info.condition_shape) == ((16, 2), (2, 13))
    batch = next(ShardStream(folder, batch_size=32, seed=0))
    assert batch.data.abs().max() < 6
    with pytest.raises(
        ValueError,
        match=r"holds 2 successful demonstrations .* for 3 successful demonstrations .* name another data.folder",
    ):
        PushTData(folder=tmp_path / "pusht", demonstrations=3).prepare()


def measured(network: torch.nn.Module, folder: Path, **given: int) -> dict[str, Any]:
    settings = PolicyEvaluation(steps=(1,), **given)
    config = recipe().model_copy(update={"evaluation": settings})
    described = config_of_run(config, config.data.describe(), weights="ema", step=1)
    model = Model(network, described, "ema", folder, config.name)
    return finish_report(settings.run(model, config), model, config)


class Still(torch.nn.Module):
    """A policy whose one-step sample is to stay: the target is where the pusher is."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        return -x_t


def test_a_policy_that_does_nothing_scores_what_the_start_covers(tmp_path: Path) -> None:
    report = measured(Still(), tmp_path, episodes=4, max_steps=16)
    assert json.loads((tmp_path / "evaluation-policy.json").read_text()) == report
    values = report["rows"][0]["values"]
    assert values["score"] < 0.6
    assert (values["solved"], values["length"]) == (0, 16)
    assert f"{values['score']:.4f}" in table_of(report)


def test_the_expert_through_the_same_episodes_solves_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The roll-out itself loses nothing: deciding each action by the expert scores 1."""
    experts: dict[int, Expert] = {}

    def by_expert(model: Model, running: list[Episode], seed: int, steps: int, decision: int) -> np.ndarray:
        return np.stack([experts.setdefault(e.seed, Expert())(e.states[-1])[None] for e in running])

    monkeypatch.setattr(evaluation, "decide", by_expert)
    (row,) = measured(Still(), tmp_path, episodes=3, executed=1)["rows"]
    assert (row["values"]["score"], row["values"]["solved"]) == (1, 1)
    assert sorted(experts) == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
    assert 0.5 < SOLVED <= 0.95


def test_recipe_at_smoke_size_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["data.demonstrations=2", "backbone.options.width=8", "evaluation.episodes=1", "training.device=cpu"]
    folder = run_recipe(recipe(), small, Options(run_dir=tmp_path / "run", smoke=True))
    assert folder is not None
    rows = json.loads((folder / "evaluation-policy.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [1, 4]
    assert not (folder / "samples.png").exists()
    run_recipe(recipe(), ["training.steps=6"], Options(run_dir=folder, resume=True))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1].endswith("6")
