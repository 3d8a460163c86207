"""ImageNet-256, class-conditional, DiT-B/2 in latents: the shortcut model of the paper's table 1.

Paper: "One Step Diffusion via Shortcut Models" (arXiv 2410.12557), table 1, row "Shortcut", column ImageNet-256.

Data, once (42 GB of latents with those of mirror images; raw images in class folders, a tar, zip or parquet files)::

    torchrun --standalone --nproc-per-node 8 --no-python shortcutflow prepare IMAGENET/train \\
        data/imagenet-256-latents --size 256 --latents

The reference, once (the images themselves; or the authors' file of statistics as ``evaluation.reference=FILE``)::

    shortcutflow evaluate --make-stats IMAGENET/train --size 256 --protocol released-code \\
        --out data/imagenet-256-released-code.npz

Command::

    torchrun --standalone --nproc-per-node 8 recipes/dit_b_imagenet.py
    torchrun --standalone --nproc-per-node 8 --no-python shortcutflow train dit_b_imagenet_released   # see below
    python recipes/dit_b_imagenet.py --smoke                                   # a tiny one, on any CPU, in seconds

Hardware: 8 GPUs with 80 GB; any number that divides 256 gives the same run, and
``training.gradient_checkpointing=true`` or ``training.accumulation=4`` fits it into less memory.
Cost: at least 9.5 GPU-hours on H100 at 989 TFLOP/s for its products alone. Computed from the operations of the network
(46.0 GFLOP a forward pass; 3 passes' worth a sample and 0.58 for the targets), not measured. With the memory's traffic
a step takes at least 78 ms by the count in docs/performance.md, the run 17 GPU-hours.

Expected FID-50k at 128 / 4 / 1 steps: 15.5 / 28.3 / 40.3, as the authors' README has it. Protocol: 50,000 samples
without guidance in the sampler, labels drawn at random, decoded by the autoencoder below; JAX Inception, images
resized bilinearly to 299 without antialiasing, against the authors' own statistics. Other protocols give other numbers.
Independent re-runs, quoted from their texts and not checked here: AlignFlow (ICLR 2026), with the authors' code,
33.11 / 46.65 at 4 / 1 steps, about 6 worse than the paper at one step. Within 6 of the authors' numbers is a success.

Where the paper and the released command differ, ``recipe()`` follows the paper and ``released_recipe()`` the command
(the name of a checkpoint of the authors, "every4", says that the published numbers were made with 1/4). By field:

    name                             dit_b_imagenet -> dit_b_imagenet_released
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
average. The released code encodes each image anew at every step; here its moments are stored and the latent is drawn
anew, which is the same in distribution.
"""

from shortcutflow.cli import launch
from shortcutflow.config import RunConfig, TrainingConfig
from shortcutflow.data.source import ShardsData
from shortcutflow.ema import EMAConfig
from shortcutflow.evaluation.protocol_evaluation import ProtocolEvaluation
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.optim import OptimizerConfig


def recipe() -> RunConfig:
    """The run as the paper describes it."""
    return RunConfig(
        name="dit_b_imagenet",
        data=ShardsData(folder="data/imagenet-256-latents", vae="stabilityai/sd-vae-ft-mse", horizontal_flip=True),
        backbone=BackboneConfig(name="dit_b_2", smoke_options={"width": 32, "depth": 2, "heads": 2}),
        objective=ShortcutObjective(
            finest_steps=128, bootstrap_fraction=0.25, guidance_scale=1.5, condition_dropout=0.1
        ),
        optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.1),
        emas={"ema": EMAConfig(decay=0.999)},
        training=TrainingConfig(
            steps=800_000, global_batch_size=256, precision="bfloat16", compile=True, parallel="ddp",
            log_every=100, grid_every=10_000, checkpoint_every=5_000, keep_checkpoint_every=100_000, hang_timeout=900,
        ),
        evaluation=ProtocolEvaluation(
            protocol="released-code", steps=(1, 4, 128), reference="data/imagenet-256-released-code.npz",
            precision="bfloat16",
        ),
    )  # fmt: skip


def released_recipe() -> RunConfig:
    """The run as the released command makes it."""
    paper = recipe()
    return paper.model_copy(
        update={
            "name": "dit_b_imagenet_released",
            "backbone": paper.backbone.model_copy(update={"options": {"released": True}}),
            "objective": ShortcutObjective.released(cfg_scale=1.5, bootstrap_cfg=True, class_dropout_prob=0.1),
            "emas": {"ema": EMAConfig(decay=0.999, warm_up=False)},
            "sample_weights": "current",
            "training": paper.training.model_copy(update={"steps": 810_000}),
        }
    )


if __name__ == "__main__":
    launch(recipe())
