"""ImageNet-256, from a trained flow to a shortcut model: SiT-XL/2 goes on training for a twentieth of its own length.

Paper: "One Step Diffusion via Shortcut Models" (arXiv 2410.12557); that a trained flow or diffusion model can be made a
shortcut model is a question its users asked first. SiT: arXiv 2401.08740.

The start, once: SiT-XL/2's public checkpoint, as a model folder of this library (docs/checkpoints.md)::

    shortcutflow convert SiT-XL-2-256x256.pt --kind sit --out models/sit-xl-2

Its network predicts the velocity of the same straight path, so at first every step size is given the same velocity.
Then three stages: flow rows only until 5 % of the steps, while average and optimizer warm up; self-consistency without
guidance until 40 %; and with guidance of 1.5 at the smallest bootstrapped step until the end. Guidance comes last in
another few-step method's re-implementation that tunes SiT-XL (quoted from its readme, not checked here). The frozen
start is the teacher all along: its velocity is what steps of 1/128 are trained on, and makes half steps of that size.
None of these numbers has been tuned at this size.

Data: as for ``dit_b_imagenet``, the same shards and the same reference. SiT names its autoencoder sd-vae-ft-ema; both
of that family have one encoder and differ in the decoder only, so the latents are the same.

Command::

    torchrun --standalone --nproc-per-node 8 recipes/finetune_from_sit.py
    torchrun --standalone --nproc-per-node 8 recipes/finetune_from_sit.py teacher=null objective.flow_of=data
    python recipes/finetune_from_sit.py --smoke                                 # a tiny one, on any CPU, in seconds

The second learns from data instead of a teacher. Another start (``start=FOLDER teacher=FOLDER``, its network in
``backbone.name`` and ``backbone.options``) may be anything that ``shortcutflow convert`` reads, or a run of
``objective.kind=flow_matching``.

Hardware: 8 GPUs with 80 GB; weights, teacher, average and optimizer are sharded (FSDP2).
Cost: at least 26 GPU-hours on H100 at 989 TFLOP/s for its products alone. Computed from the operations of the network
(237.2 GFLOP a forward pass; 3 passes' worth a sample and 1.36 for the targets), not measured: 350,000 steps of 256 are
70 epochs, SiT's own training has 1,400.

Expected FID-50k at 128 / 4 / 1 steps: not measured. What is known: on digits a start from a flow beats the same compute
from scratch at one step (docs/checkpoints.md). Independent re-runs, quoted from their texts and not checked here: F2D2
reports 12.75 instead of 27.28 in one step on CIFAR-10 with a teacher, and DMF, another method, 2.16 in one step on
ImageNet-256 from a SiT with REPA. Protocol of both: their own.
"""

from pathlib import Path

from shortcutflow.cli import launch
from shortcutflow.config import RunConfig, TrainingConfig
from shortcutflow.data.source import ShardsData
from shortcutflow.ema import EMAConfig
from shortcutflow.evaluation.protocol_evaluation import ProtocolEvaluation
from shortcutflow.network import BackboneConfig
from shortcutflow.objectives.shortcut import ShortcutObjective
from shortcutflow.optim import OptimizerConfig

SIT = Path("models/sit-xl-2")


def recipe() -> RunConfig:
    """The run."""
    return RunConfig(
        name="finetune_from_sit",
        data=ShardsData(folder="data/imagenet-256-latents", vae="stabilityai/sd-vae-ft-mse", horizontal_flip=True),
        backbone=BackboneConfig(
            name="dit",
            options={"width": 1152, "depth": 28, "heads": 16, "patch": 2, "mlp_ratio": 4.0, "time_scale": 1.0},
            smoke_options={"width": 32, "depth": 2, "heads": 2},
        ),
        objective=ShortcutObjective(
            finest_steps=128, bootstrap_fraction=0.25, guidance_scale=1.5, condition_dropout=0.1,
            bootstrap_from=0.05, guidance_from=0.4, flow_of="teacher",
        ),
        optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.01, warm_up_steps=1000),
        emas={"ema": EMAConfig(decay=0.999)},
        start=SIT,
        teacher=SIT,
        training=TrainingConfig(
            steps=350_000, global_batch_size=256, precision="bfloat16", compile=True, parallel="fsdp",
            log_every=100, grid_every=5_000, checkpoint_every=5_000, keep_checkpoint_every=50_000, hang_timeout=900,
        ),
        evaluation=ProtocolEvaluation(
            protocol="released-code", steps=(1, 4, 128), reference="data/imagenet-256-released-code.npz",
            precision="bfloat16",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    launch(recipe())
