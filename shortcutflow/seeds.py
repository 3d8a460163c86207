"""Random numbers by name: a generator is a function of (seed, purpose, step, index), so nothing about it is saved."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Generator, Tensor

from shortcutflow.types import FULL_BATCH, BatchSlice

BLOCK_ROWS = 64
"""A batch's noise is drawn in blocks of at least so many rows, each with a seed of its own: a block costs a launch."""


def generator_for(
    seed: int, purpose: str, *, step: int = 0, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one purpose at one step, or of one of several there; the global generator is never touched."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, step=step, index=index))


def seed_for(seed: int, purpose: str, *, step: int = 0, index: int = 0) -> int:
    """A 63-bit seed that differs for every combination of its arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_or_default(generator: Generator | None, device: torch.device | str) -> Generator:
    """The given generator, or a new one seeded from torch's default generator, which ``torch.manual_seed`` seeds.

    The only place where this library reads the default generator.
    """
    if generator is not None:
        return generator
    return Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))


@lru_cache
def noise_blocks(rows: int) -> int:
    """In how many blocks so many rows of noise are drawn: what most numbers of slices divide, best powers of two."""
    divisors = [b for b in range(1, max(rows // BLOCK_ROWS, 1) + 1) if rows % b == 0]
    return max(divisors, key=lambda b: (sum(b % k == 0 for k in divisors), b & -b, b))


def draw_noise_rows(
    rows: int,
    shape: Sequence[int],
    generator: Generator,
    batch_slice: BatchSlice = FULL_BATCH,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise (rows, *shape) for a slice of a batch: the rows that the whole batch would have there.

    Row i of the batch's n rows lies in block i modulo B, where B, at most n/64, depends on n alone. A block has a seed
    made from the generator's state, so a slice draws the blocks that hold its rows and no others: exactly its own rows
    if the number of slices divides B. The generator itself does not move: draw something else from it afterwards.
    """
    index, count = batch_slice.index, batch_slice.count
    total = rows * count
    blocks = noise_blocks(total)
    seed = int.from_bytes(hashlib.sha256(generator.get_state().numpy().tobytes()).digest()[:8], "little")
    of_block = Generator(generator.device)
    common = math.gcd(count, blocks)
    here: dict[int, Tensor] = {}
    for block in range(index % common, blocks, common):
        of_block.manual_seed(seed_for(seed, "noise", index=block))
        drawn = torch.randn((total // blocks, *shape), generator=of_block, dtype=dtype, device=device)
        # The block's rows are block, block + B, block + 2B, ...; every (count / common)-th is of this slice.
        first = next(i for i in range(count) if (block + i * blocks - index) % count == 0)
        here[(block + first * blocks - index) // count] = drawn[first :: count // common]
    return torch.stack([here[place] for place in sorted(here)], dim=1).flatten(0, 1)
