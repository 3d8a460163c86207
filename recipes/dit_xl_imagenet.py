"""ImageNet-256, class-conditional, DiT-XL/2 in latents: the largest model of the authors.

Paper: "One Step Diffusion via Shortcut Models" (arXiv 2410.12557). Its table 1 is of DiT-B; the numbers of this size
are those of the authors' README, row "Imagenet-256 (DiT-XL)".

Data: as for ``dit_b_imagenet``, the same shards and the same reference.

Command::

    torchrun --standalone --nproc-per-node 8 recipes/dit_xl_imagenet.py
    torchrun --standalone --nproc-per-node 8 --no-python shortcutflow train dit_xl_imagenet_released   # see below
    python recipes/dit_xl_imagenet.py --smoke                                   # a tiny one, on any CPU, in seconds

Hardware: 8 GPUs with 80 GB, weights, average and optimizer sharded (FSDP2); ``training.gradient_checkpointing=true``
takes less memory and a third more time. On several machines of 8 GPUs, ``training.shard_group=8`` keeps shards inside a
machine.
Cost: at least 49 GPU-hours on H100 at 989 TFLOP/s for its products alone. Computed from the operations of the network
(237.2 GFLOP a forward pass; 3 passes' worth a sample and 0.58 for the targets), not measured; what the memory adds, by
count, stands in docs/performance.md. Checkpoints of 10.8 GB each: two, and one every 100,000 steps.

Expected FID-50k at 128 / 4 / 1 steps: 3.8 / 7.8 / 10.6, as the authors' README has it, with the protocol of
``dit_b_imagenet``. The name of the authors' checkpoint ends in "continue200000": theirs was trained in stages, and how
many steps it has in all is not known; the README's command says 810,000. Independent re-runs: none with this network
is known. Of a shortcut model of this size another text (iSM, arXiv 2510.21250) reports, quoted and not checked here, an
inception score of 102.66 / 125.66 / 136.79 and a distance in DINOv2 features of 500.92 / 329.53 / 265.90 at 1 / 2 / 4
steps.

Where the paper and the released command differ, ``recipe()`` follows the paper and ``released_recipe()`` the command.
By field:

    name                             dit_xl_imagenet -> dit_xl_imagenet_released
    training.steps                   800000 -> 810000
    objective.bootstrap_fraction     0.25 -> 0.125, the default of bootstrap_every that the command leaves alone
    objective.rows                   each_once -> released: some images twice, others never, no labels dropped on
                                     bootstrap rows
    objective.clip                   null -> 4.0
    objective.sigma_min              0.0 -> 1e-05
    backbone.options.released        (false) -> true: attention divided by the head size, t not multiplied by 1000
    emas.ema.warm_up             true -> false: targets start from a network that gives zero
    sample_weights                   ema -> current: use_ema is 0, so the command evaluates the raw weights

In both: guidance of 1.5 inside the targets of the smallest bootstrapped step, labels dropped with 0.1, targets by the
average. The latent is drawn anew at each visit from stored moments, where the released code encodes anew.
"""

from recipes import dit_b_imagenet
from shortcutflow.cli import launch
from shortcutflow.config import RunConfig


def recipe() -> RunConfig:
    """The run as the paper describes it."""
    return _enlarged(dit_b_imagenet.recipe(), "dit_xl_imagenet")


def released_recipe() -> RunConfig:
    """The run as the released command makes it."""
    return _enlarged(dit_b_imagenet.released_recipe(), "dit_xl_imagenet_released")


def _enlarged(dit_b: RunConfig, name: str) -> RunConfig:
    """The same run with the larger network, which is sharded; everything else is as for DiT-B."""
    return dit_b.model_copy(
        update={
            "name": name,
            "backbone": dit_b.backbone.model_copy(update={"name": "dit_xl_2"}),
            "training": dit_b.training.model_copy(update={"parallel": "fsdp"}),
        }
    )


if __name__ == "__main__":
    launch(recipe())
