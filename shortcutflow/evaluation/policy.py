"""A policy in the real Push-T environment, by sampling budget: coverage reached and share of episodes solved."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shortcutflow.config import PolicyEvaluation
from shortcutflow.data.pusht import actions_of, features
from shortcutflow.data.pusht_expert import make_env
from shortcutflow.evaluation.generate import generate
from shortcutflow.evaluation.runs import write_report
from shortcutflow.run_dir import Run
from shortcutflow.seeds import generator_for

FIRST_SEED = 1_000_000
"""Of the episodes: demonstrations start at 0, so no starting position was trained on."""

SOLVED = 0.95
"""Share of the goal that the block must cover."""


@dataclass(frozen=True)
class PolicyRow:
    """One sampling budget.

    Attributes:
        steps: network calls a decision.
        score: mean over episodes of the largest coverage, over 0.95 and at most 1.
        solved: share of episodes that reached it.
        length: mean number of actions an episode took.
        ms_per_decision: wall milliseconds of sampling a decision for all running episodes at once.
    """

    steps: int
    score: float
    solved: float
    length: float
    ms_per_decision: float


class Episode:
    """One run of the environment, remembering what the policy is allowed to see."""

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


def evaluate_policy(run: Run) -> list[PolicyRow]:
    """Run the policy at every budget of its evaluation config, the same episodes for each; write the report.

    Raises:
        ValueError: if the run has no such evaluation.
        ImportError: if gym-pusht is not installed.
    """
    settings = run.config.evaluation
    if not isinstance(settings, PolicyEvaluation):
        raise ValueError(f"the config of run {run.folder} has no evaluation of a policy")
    rows = [roll_out(run, settings, steps) for steps in settings.steps]
    protocol = (
        f"gym-pusht, {settings.episodes} episodes of unseen starting positions, seeds from {FIRST_SEED}; "
        f"{settings.executed} actions executed a decision; score: mean of the largest coverage / 0.95, at most 1"
    )
    write_report(run, protocol=protocol, rows=rows)
    return rows


def roll_out(run: Run, settings: PolicyEvaluation, steps: int) -> PolicyRow:
    """All episodes side by side: one batch of decisions at a time."""
    observed, _ = run.info.condition_shape or (1, 0)
    episodes = [Episode(FIRST_SEED + i, observed, settings.max_steps) for i in range(settings.episodes)]
    seconds, decisions = 0.0, 0
    while running := [episode for episode in episodes if not episode.over]:
        start = time.perf_counter()
        chunks = decide(run, running, steps, decisions)
        seconds, decisions = seconds + time.perf_counter() - start, decisions + 1
        for episode, chunk in zip(running, chunks, strict=True):
            episode.act(chunk[: settings.executed])
    scores = [min(episode.best / SOLVED, 1.0) for episode in episodes]
    return PolicyRow(
        steps,
        score=float(np.mean(scores)),
        solved=float(np.mean([episode.best >= SOLVED for episode in episodes])),
        length=float(np.mean([episode.actions_taken for episode in episodes])),
        ms_per_decision=1000 * seconds / decisions,
    )


def decide(run: Run, episodes: list[Episode], steps: int, decision: int) -> np.ndarray:
    """Trajectories of actions (episodes, horizon, 2) for what each episode sees now."""
    device = next(run.network.parameters()).device
    seen = torch.from_numpy(np.stack([features(np.stack(episode.states)) for episode in episodes])).to(device)
    noise = torch.stack([_noise(run, episode, decision) for episode in episodes]).to(device)
    sampled = generate(run.network, noise, seen, steps=steps, **run.config.sampler_options(run.info))
    now = np.stack([episode.states[-1] for episode in episodes])
    return actions_of(sampled.cpu().numpy(), now[:, None])


def _noise(run: Run, episode: Episode, decision: int) -> Tensor:
    """A function of the run's seed, the episode and the decision, whatever the budget."""
    generator = generator_for(run.config.seed, f"policy of episode {episode.seed}", step=decision)
    return torch.randn(run.info.shape, generator=generator)


def table(rows: list[PolicyRow]) -> str:
    """The rows as a table for people."""
    lines = ["steps   score   solved   actions an episode   ms a decision"]
    lines += [
        f"{r.steps:5d}   {r.score:5.3f}   {r.solved:6.1%}   {r.length:18.0f}   {r.ms_per_decision:13.1f}" for r in rows
    ]
    return "\n".join(lines)
