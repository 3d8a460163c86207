"""ImageNet-256, DiT-B/2, with what gave the best samples on small data: ``dit_b_imagenet`` with other settings.

Data, network, optimizer and compute are those of ``recipes/dit_b_imagenet.py``; ``with_best_settings`` in
``recipes/digits.py`` says what differs, why, and what it gave where it was measured. **Nobody has trained this
recipe.**

The pool has 16 samples a class, fewer than the digits' 179, so expect less of the coupling here.

Data, hardware, cost, protocol: see ``recipes/dit_b_imagenet.py``; the number of operations is the same.

Command::

    torchrun --standalone --nproc-per-node 8 recipes/dit_b_imagenet_best.py
    python recipes/dit_b_imagenet_best.py --smoke                    # a tiny one, on any CPU, in seconds
"""

from recipes import dit_b_imagenet
from recipes.digits import with_best_settings
from shortcutflow.cli import launch
from shortcutflow.config import RunConfig


def recipe() -> RunConfig:
    """The run."""
    return with_best_settings(dit_b_imagenet.recipe(), "dit_b_imagenet_best", pool=16_384)


if __name__ == "__main__":
    launch(recipe())
