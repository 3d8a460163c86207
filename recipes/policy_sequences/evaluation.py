"""A policy in the Push-T environment by number of sampling steps: coverage reached, and fraction of episodes solved."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field

from recipes.policy_sequences.data import actions_of, features
from recipes.policy_sequences.expert import make_env
from shortcutflow.config import EvaluationSettings, RunConfig
from shortcutflow.evaluation.generate import generate
from shortcutflow.models.model import Model
from shortcutflow.seeds import generator_for

FIRST_SEED = 1_000_000
"""Of the episodes: demonstrations start at 0, so no starting position was trained on."""

SOLVED = 0.95
"""Fraction of the goal that the block must cover."""


class PolicyEvaluation(EvaluationSettings):
    """How a policy does in Push-T's environment.

    Args:
        steps: numbers of sampling steps of a decision.
        episodes: how many, from starting positions that no demonstration had.
        executed: actions carried out before the next decision.
        max_steps: actions after which an episode ends unsolved.
    """

    kind: Literal["policy"] = "policy"
    steps: tuple[Annotated[int, Field(ge=1)], ...] = (1, 4, 128)
    episodes: int = Field(default=100, ge=1)
    executed: int = Field(default=8, ge=1)
    max_steps: int = Field(default=300, ge=1)

    def check(self, config: RunConfig) -> None:
        """The data must be Push-T's, and gym-pusht installed."""
        if config.data.kind != "pusht":
            raise ValueError(f"evaluation 'policy' is for data 'pusht'; with {config.data.kind!r} use evaluation=null")
        make_env()

    def smoke(self) -> Self:
        """The same with two short episodes."""
        return self.model_copy(update={"episodes": 2, "max_steps": 16, "steps": (1, 4)})

    def run(self, model: Model, config: RunConfig) -> dict[str, Any]:
        """Run the policy with every number of steps, the same episodes for each."""
        return {
            "protocol": {
                "name": "policy",
                "description": f"gym-pusht, {self.episodes} episodes of unseen starting positions, seeds from "
                f"{FIRST_SEED}; {self.executed} actions executed a decision; score: mean of the largest coverage / "
                "0.95, at most 1",
            },
            "rows": [self._row(model, config.seed, steps) for steps in self.steps],
        }

    def _row(self, model: Model, seed: int, steps: int) -> dict[str, Any]:
        """All episodes side by side: one batch of decisions at a time."""
        observed, _ = model.info.condition_shape or (1, 0)
        episodes = [Episode(FIRST_SEED + i, observed, self.max_steps) for i in range(self.episodes)]
        seconds, decisions = 0.0, 0
        while running := [episode for episode in episodes if not episode.over]:
            start = time.perf_counter()
            chunks = decide(model, running, seed, steps, decisions)
            seconds, decisions = seconds + time.perf_counter() - start, decisions + 1
            for episode, chunk in zip(running, chunks, strict=True):
                episode.act(chunk[: self.executed])
        values = {
            "score": float(np.mean([min(episode.best / SOLVED, 1.0) for episode in episodes])),
            "solved": float(np.mean([episode.best >= SOLVED for episode in episodes])),
            "length": float(np.mean([episode.actions_taken for episode in episodes])),
            "ms_a_decision": 1000 * seconds / decisions,
        }
        return {"steps": steps, "values": values, "seconds": {"sampling": seconds}}


class Episode:
    """One run of the environment, with the states that the policy may see."""

    def __init__(self, seed: int, observed: int, max_steps: int) -> None:
        self.env, self.seed, self.max_steps = make_env(), seed, max_steps
        state, _ = self.env.reset(seed=seed)
        self.states = [np.asarray(state, np.float64)] * observed
        self.best, self.actions_taken = 0.0, 0

    @property
    def over(self) -> bool:
        """Solved, or out of time."""
        return self.best >= SOLVED or self.actions_taken >= self.max_steps

    def act(self, actions: np.ndarray) -> None:
        """Execute actions (n, 2) until they or the episode end."""
        for action in actions:
            if self.over:
                return
            state, _, _, _, info = self.env.step(action.astype(np.float32))
            self.states = [*self.states[1:], np.asarray(state, np.float64)]
            self.best = max(self.best, float(info["coverage"]))
            self.actions_taken += 1


def decide(model: Model, episodes: list[Episode], seed: int, steps: int, decision: int) -> np.ndarray:
    """Trajectories of actions (episodes, horizon, 2) for what each episode sees now.

    Noise is a function of the run's seed, the episode and the decision, whatever the number of steps.
    """
    seen = torch.from_numpy(np.stack([features(np.stack(episode.states)) for episode in episodes])).to(model.device)
    generators = [generator_for(seed, f"policy of episode {episode.seed}", step=decision) for episode in episodes]
    noise = torch.stack([torch.randn(model.shape, generator=generator) for generator in generators]).to(model.device)
    sampled = generate(model, noise, seen, steps=steps)
    now = np.stack([episode.states[-1] for episode in episodes])
    return actions_of(sampled.cpu().numpy(), now[:, None])
