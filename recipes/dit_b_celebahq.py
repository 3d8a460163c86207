"""CelebA-HQ-256, unconditional, DiT-B/2 in latents: the shortcut model of the paper's table 1.

Paper: "One Step Diffusion via Shortcut Models" (arXiv 2410.12557), table 1, row "Shortcut", column CelebA-HQ-256.

Data, once (30,000 images of 256x256; 1 GB of latents with those of mirror images)::

    shortcutflow prepare CELEBAHQ data/celebahq-256-latents --size 256 --no-labels --latents

The reference, once (the images themselves; or the authors' file of statistics as ``evaluation.reference=FILE``)::

    shortcutflow evaluate --make-stats CELEBAHQ --size 256 --protocol released-code \\
        --out data/celebahq-256-released-code.npz

Command::

    python recipes/dit_b_celebahq.py
    shortcutflow train dit_b_celebahq_released                                  # see below
    torchrun --standalone --nproc-per-node 4 recipes/dit_b_celebahq.py          # the same run on 4 GPUs
    python recipes/dit_b_celebahq.py --smoke                                    # a tiny one, on any CPU, in seconds

Hardware: one GPU with 40 GB; with ``training.accumulation=4`` one with much less.
Cost: at least 1.2 GPU-hours on H100 at 989 TFLOP/s for its products alone. Computed from the operations of the network
(46.0 GFLOP a forward pass; 3 passes' worth a sample and 0.50 for the targets), not measured.

Expected FID-50k at 128 / 4 / 1 steps: 6.9 / 13.8 / 20.5, as the authors' README has it. Protocol: 50,000 samples
decoded by the autoencoder below; JAX Inception, images resized bilinearly to 299 without antialiasing, against the
authors' own statistics of the data. Other protocols give other numbers. Independent re-runs: none on CelebA-HQ is
known; on ImageNet one came out about 6 worse at one step (see ``dit_b_imagenet``), and within 6 is a success here too.

Where the paper and the released command differ, ``recipe()`` follows the paper and ``released_recipe()`` the command
(the name of a checkpoint of the authors, "celeba-shortcut2-every4400001", says that the published numbers were made
with 1/4, after 400,000 steps). By field:

    name                             dit_b_celebahq -> dit_b_celebahq_released
    training.steps                   400000 -> 410000
    objective.bootstrap_fraction     0.25 -> 0.125, the default of bootstrap_every that the command leaves alone
    objective.rows                   each_once -> released: some images twice, others never; of 8 bootstrap rows one a
                                     size, and the eighth at d = 1
    objective.clip                   null -> 4.0
    objective.sigma_min              0.0 -> 1e-05
    backbone.options.released        (false) -> true: attention divided by the head size, t not multiplied by 1000
    backbone.options.num_classes     (none) -> 1: a table of two labels, of which only the null one is ever read
    emas.ema.warm_up             true -> false: targets start from a network that gives zero
    sample_weights                   ema -> current: use_ema is 0, so the command evaluates the raw weights

The command's class_dropout_prob of 1 changes nothing: with cfg_scale 0 every label is the null label before any could
be dropped. That label's embedding is a constant, which biases can hold as well: without labels the network can be the
same functions. The released code shows each image or its mirror image, as here, and encodes it anew at every step;
here its moments are stored and the latent is drawn anew, which is the same in distribution.
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
        name="dit_b_celebahq",
        data=ShardsData(folder="data/celebahq-256-latents", vae="stabilityai/sd-vae-ft-mse", horizontal_flip=True),
        backbone=BackboneConfig(name="dit_b_2", smoke_options={"width": 32, "depth": 2, "heads": 2}),
        objective=ShortcutObjective(finest_steps=128, bootstrap_fraction=0.25),
        optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.1),
        emas={"ema": EMAConfig(decay=0.999)},
        training=TrainingConfig(
            steps=400_000, global_batch_size=64, precision="bfloat16", compile=True, parallel="ddp",
            log_every=100, grid_every=10_000, checkpoint_every=5_000, keep_checkpoint_every=100_000, hang_timeout=900,
        ),
        evaluation=ProtocolEvaluation(
            protocol="released-code", steps=(1, 4, 128), reference="data/celebahq-256-released-code.npz",
            precision="bfloat16",
        ),
    )  # fmt: skip


def released_recipe() -> RunConfig:
    """The run as the released command makes it."""
    paper = recipe()
    return paper.model_copy(
        update={
            "name": "dit_b_celebahq_released",
            "backbone": paper.backbone.model_copy(update={"options": {"released": True, "num_classes": 1}}),
            "objective": ShortcutObjective.released(class_dropout_prob=0.0),
            "emas": {"ema": EMAConfig(decay=0.999, warm_up=False)},
            "sample_weights": "current",
            "training": paper.training.model_copy(update={"steps": 410_000}),
        }
    )


if __name__ == "__main__":
    launch(recipe())
