"""Settings of training itself: how long, how large, how often."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shortcutflow.schedule import DEFAULT_STEPS


class TrainingConfig(BaseModel):
    """How long, how large, how often.

    Args:
        steps: optimizer steps in all.
        global_batch_size: samples an optimizer step, over all processes.
        accumulation: a process takes its slice of a batch in so many equal parts, one after the other.
        precision: "bfloat16" runs the network under autocast; weights, gradients' sums, t and d stay float32.
        tf32: let float32 products on a GPU use its tensor cores, with 10 bits of mantissa.
        deterministic: on a GPU, use kernels that repeat bit for bit, and refuse operators that have none. Slower, by
            how much depends on the network; needless on a CPU.
        compile: run the network through torch.compile.
        gradient_checkpointing: run parts of the network again in the backward pass instead of keeping their insides;
            less memory, a third more time.
        parallel: how several processes share a run: "ddp", the whole network in each, or "fsdp", sharded (FSDP2).
        shard_group: processes that hold one sharded copy together, "fsdp" only; None is all of them. With 8 on
            machines of 8 GPUs, shards stay inside a machine and only gradients cross (hybrid sharding).
        device: "auto" is a GPU if there is one.
        log_every, grid_every, checkpoint_every: in steps; 0 never (the last step is always saved).
        keep_checkpoints: older ones are deleted,
        keep_checkpoint_every: but not those at multiples of so many steps; 0 keeps none of them.
        grid_steps: numbers of sampling steps of the sample grids, a row each.
        on_non_finite: what a loss or gradient that is not finite does: "stop" the run, or "skip" the step and count it.
        hang_timeout: seconds without progress after which a process says which rank all wait for, and ends; 0 never.
        loggers: what receives numbers and images beside ``metrics.jsonl``: "tensorboard", or names of the entry-point
            group ``shortcutflow.loggers``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    tf32: bool = True
    deterministic: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    shard_group: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(default=50, ge=1)
    grid_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=1000, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    keep_checkpoint_every: int = Field(default=0, ge=0)
    grid_steps: tuple[Annotated[int, Field(ge=1)], ...] = DEFAULT_STEPS
    on_non_finite: Literal["stop", "skip"] = "stop"
    hang_timeout: float = Field(default=1800, ge=0)
    loggers: tuple[str, ...] = ("tensorboard",)

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainingConfig:
        if self.global_batch_size % self.accumulation:
            raise ValueError(
                f"a global batch of {self.global_batch_size} cannot be taken in {self.accumulation} equal parts"
            )
        if self.shard_group is not None and self.parallel != "fsdp":
            raise ValueError(f"shard_group is for parallel 'fsdp', not {self.parallel!r}")
        return self
