"""Push-T's data: the expert's demonstrations as pairs of states and actions.

A sample is a trajectory of the next 16 actions (target positions of the pusher), conditioned on the last two states:
what a diffusion policy is trained on (Chi et al., arXiv 2303.04137).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from recipes.policy_sequences.expert import Demonstration, demonstrate
from shortcutflow.data.manifest import MANIFEST, Manifest
from shortcutflow.data.shards import Sample, write_shards
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.io.atomic import build_once

TABLE = 512.0
"""Side of the table in pixels: positions lie in [0, 512]."""

UNIT = 100.0
"""Pixels that are 1 in the block's frame."""

GOAL = np.array([256.0, 256.0, np.pi / 4])
"""Where the block has to be: x, y, angle."""

FEATURES = 13
"""Numbers that describe a state to the policy."""


class PushTData(DataSettings):
    """Demonstrations of Push-T, recorded as shards into ``folder`` the first time they are needed."""

    kind: Literal["pusht"] = "pusht"
    folder: Path = Path("data/pusht")
    demonstrations: int = Field(default=600, ge=1, description="successful episodes; failed ones are dropped")
    horizon: int = Field(default=16, ge=1, description="actions a trajectory")
    observed: int = Field(default=2, ge=1, description="states it is conditioned on, the present one last")

    def prepare(self) -> Path:
        """Record demonstrations unless they are there; returns their folder.

        Raises:
            ImportError: if gym-pusht is not installed.
            ValueError: if the folder holds trajectories recorded with other settings.
        """
        recorded = (
            f"{self.demonstrations} successful demonstrations of the scripted expert, seeds from 0; {self.horizon} "
            f"actions after {self.observed} states"
        )
        build_once(
            self.folder,
            lambda folder: write_shards(self._samples(), folder, samples_per_shard=4096, preprocessing=recorded),
            marker=MANIFEST,
        )
        if (found := Manifest.read(self.folder).preprocessing) != recorded:
            raise ValueError(f"{self.folder} holds {found}; for {recorded} name another data.folder")
        return self.folder

    def describe(self) -> DataInfo:
        """Trajectories (horizon, 2), conditioned on (observed, 13); no labels."""
        return DataInfo((self.horizon, 2), None, (self.observed, FEATURES))

    def _samples(self) -> Iterator[Sample]:
        """Each step of the first successful episodes, in the order of their seeds 0, 1, ..."""
        episodes = ((seed, demonstrate(seed)) for seed in itertools.count())
        successful = ((seed, episode) for seed, episode in episodes if episode.success)
        wanted = itertools.islice(successful, self.demonstrations)
        for seed, episode in tqdm(wanted, "demonstrations", self.demonstrations, unit="episode", mininterval=10):
            yield from windows(episode, self.horizon, self.observed, f"episode{seed:05d}")


def windows(episode: Demonstration, horizon: int, observed: int, name: str) -> Iterator[Sample]:
    """One sample a step: the coming actions, and the states up to now; first and last are repeated at the ends."""
    states, seen, actions = episode.states, features(episode.states), episode.actions
    for i in range(len(actions)):
        past = np.arange(i - observed + 1, i + 1).clip(min=0)
        coming = np.arange(i, i + horizon).clip(max=len(actions) - 1)
        yield Sample(scaled_actions(actions[coming], states[i]), seen[past], f"{name}-{i:03d}")


def features(states: np.ndarray) -> np.ndarray:
    """What the policy sees of states (..., 5), as (..., 13) of order 1.

    Pusher and goal in the block's frame, where the same push is always the same numbers; the goal once more with small
    errors magnified, since the last pixels decide; and where pusher and block are on the table, for its walls.
    """
    pusher, block, angle = states[..., :2], states[..., 2:4], states[..., 4]
    to_goal, turn = _turned(GOAL[:2] - block, -angle), GOAL[2] - angle
    turn = np.arctan2(np.sin(turn), np.cos(turn))[..., None]
    parts = [
        _turned(pusher - block, -angle) / UNIT, to_goal / UNIT, np.cos(turn), np.sin(turn),
        np.arcsinh(to_goal / 5) / 2, np.arcsinh(turn * 20) / 2,
        states[..., :4] / (TABLE / 2) - 1,
    ]  # fmt: skip
    return np.concatenate(parts, axis=-1).astype(np.float32)


def scaled_actions(actions: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Target positions (..., 2) on the table as seen from the block in a state (..., 5), of order 1."""
    return (_turned(actions - state[..., 2:4], -state[..., 4]) / UNIT).astype(np.float32)


def actions_of(scaled: np.ndarray, state: np.ndarray) -> np.ndarray:
    """The way back, clipped to the table: the environment itself does not keep the pusher there."""
    return np.clip(_turned(scaled * UNIT, state[..., 4]) + state[..., 2:4], 0, TABLE)


def _turned(vectors: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Vectors (..., 2) rotated by angles (...)."""
    cos, sin, x, y = np.cos(angle), np.sin(angle), vectors[..., 0], vectors[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
