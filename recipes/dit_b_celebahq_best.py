"""CelebA-HQ-256, DiT-B/2, with what gave the best samples on small data: ``dit_b_celebahq`` with other settings.

Data, network, optimizer and compute are those of ``recipes/dit_b_celebahq.py``; ``with_best_settings`` in
``recipes/digits.py`` says what differs, why, and what it gave where it was measured. **Nobody has trained this
recipe.**

Data, hardware, cost, protocol: see ``recipes/dit_b_celebahq.py``; the number of operations is the same.

Command::

    python recipes/dit_b_celebahq_best.py
    python recipes/dit_b_celebahq_best.py --smoke                    # a tiny one, on any CPU, in seconds
"""

from recipes import dit_b_celebahq
from recipes.digits import with_best_settings
from shortcutflow.cli import launch
from shortcutflow.config import RunConfig


def recipe() -> RunConfig:
    """The run."""
    return with_best_settings(dit_b_celebahq.recipe(), "dit_b_celebahq_best", pool=4_096)


if __name__ == "__main__":
    launch(recipe())
