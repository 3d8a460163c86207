"""Push-T: a policy that generates its next 16 actions in one step, tried in the real environment.

    shortcutflow train policy_sequences
    shortcutflow train policy_sequences --objective flow_matching     # the contrast

A round pusher must push a T-shaped block onto its goal (gym-pusht). A scripted expert solves it by itself; 600 of its
episodes, recorded at the first run, are the demonstrations. The policy is a shortcut model over trajectories: 16 target
positions, conditioned on the last two states; 8 are executed, then it decides again. At the end 100 episodes from
unseen starting positions are run with decisions of 1, 4 and 128 network calls.

Recording takes two minutes, training six on two CPU cores. Score (mean of the largest coverage over 0.95, at most 1),
mean of three seeds: 0.88 with one network call a decision, 0.91 with 4, 0.90 with 128; solved 14 %, 23 % and 18 %. The
paper reports 0.95 for a diffusion policy with 100 steps and 0.87 for one shortcut step, on other demonstrations.

Settings are those of ``with_best_settings`` in ``recipes/digits.py``, without a coupling, as what is seen is no label.
With the paper's (``objective.finest_steps=128 objective.bootstrap_weight=1 target_weights=ema``) one run, seed 0, had
0.67 with one call, 0.86 with 4 and 0.92 with 128.

Data source (``data.py``) and evaluation (``evaluation.py``) are the recipe's own: the library finds them by the entry
points in ``pyproject.toml``, as it finds those of any other package.
"""

from recipes.digits import with_best_settings
from recipes.policy_sequences.data import PushTData
from recipes.policy_sequences.evaluation import PolicyEvaluation
from shortcutflow.config import RunConfig, TrainingConfig
from shortcutflow.ema import EMAConfig
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.optim import OptimizerConfig


def recipe() -> RunConfig:
    """The run."""
    paper = RunConfig(
        name="policy_sequences",
        data=PushTData(),
        backbone=BackboneConfig(name="unet1d_policy", options={"width": 32, "stages": 1}),
        objective=ShortcutObjective(finest_steps=128, bootstrap_fraction=0.25),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=1e-3, warm_up_steps=200, schedule="cosine"),
        emas={"ema": EMAConfig(decay=0.99)},
        training=TrainingConfig(steps=3500, global_batch_size=128, device="auto"),
        evaluation=PolicyEvaluation(),
    )
    return with_best_settings(paper, "policy_sequences", pool=None, bootstrap_weight=8)
