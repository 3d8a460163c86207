"""CIFAR-10 in pixels, unconditional, a U-Net: a shortcut model of real images on one GPU in under an hour.

The paper has no CIFAR-10; the network has the size of DDPM's. What is ours rather than the paper's: two averages of the
weights, a fast one for targets (0.95) and a slow one for sampling (0.9999, warmed up), as iSM (arXiv 2510.21250, "twin
EMA") found best; a cosine schedule after a warm-up; a bound on the gradient's norm. There is no released command.

Data: the training images as a folder, an archive or a parquet file, such as the file of the split "train" of the data
set uoft-cs/cifar10, put at ``data/cifar10-train.parquet`` (or anywhere: ``data.path=...``). The first run writes shards
into ``data/cifar10-32``.

Command::

    python recipes/unet_cifar10.py
    torchrun --standalone --nproc-per-node 4 recipes/unet_cifar10.py            # the same run on 4 GPUs
    python recipes/unet_cifar10.py --smoke                                      # a tiny one, on any CPU, in seconds
    python recipes/unet_cifar10.py data.labels=true data.folder=data/cifar10-labelled \\
        objective.condition_dropout=0.1                                         # with the ten classes

Hardware: one GPU with 24 GB or more.
Cost: at least 0.094 GPU-hours on H100 at 989 TFLOP/s for its convolutions alone, which are too small to fill a GPU.
Computed from the operations of the network (12.4 GFLOP a forward pass; 3 passes' worth a sample and 0.50 for the
targets), not measured: 30,000 steps of 256 are 154 epochs.

Expected FID-50k at 128 / 4 / 1 steps: not measured yet. Protocol: clean-fid, 50,000 samples against the training
images (``pip install 'shortcutflow[eval]'``; ``evaluation=null`` goes without). As a guide, the independent re-run in
F2D2's repository (read there; EDM's U-Net, their protocol and length of training) has 7.10 / 9.63 / 16.04 / 27.28 at
8 / 4 / 2 / 1 steps. Expect worse of less than an hour.
"""

from shortcutflow.cli import launch
from shortcutflow.config import RunConfig, TrainingConfig
from shortcutflow.data.imagefolder import ImageFolderData
from shortcutflow.ema import EMAConfig
from shortcutflow.evaluation.protocol_evaluation import ProtocolEvaluation
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.optim import OptimizerConfig

TINY = {"width": 8, "multipliers": [1, 2], "stages": 1, "head_width": 8}


def recipe() -> RunConfig:
    """The run."""
    return RunConfig(
        name="unet_cifar10",
        data=ImageFolderData(
            path="data/cifar10-train.parquet", size=32, labels=False, folder="data/cifar10-32", horizontal_flip=True
        ),
        backbone=BackboneConfig(name="unet_cifar", smoke_options=TINY),
        objective=ShortcutObjective(finest_steps=128, bootstrap_fraction=0.25),
        optimizer=OptimizerConfig(
            lr=2e-4, weight_decay=0.1, warm_up_steps=1000, schedule="cosine", max_grad_norm=1.0
        ),
        emas={"target": EMAConfig(decay=0.95), "ema": EMAConfig(decay=0.9999)},
        target_weights="target",
        sample_weights="ema",
        training=TrainingConfig(
            steps=30_000, global_batch_size=256, precision="bfloat16", compile=True, parallel="ddp",
            grid_every=2_000, checkpoint_every=2_000, keep_checkpoint_every=10_000, hang_timeout=900,
        ),
        evaluation=ProtocolEvaluation(protocol="clean-fid", steps=(1, 4, 128), precision="bfloat16"),
    )  # fmt: skip


if __name__ == "__main__":
    launch(recipe())
