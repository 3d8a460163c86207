"""Random numbers by name: a generator is a function of (seed, purpose, step, index), so nothing about it is saved."""

from __future__ import annotations

import hashlib

import torch


def generator_for(
    seed: int, purpose: str, *, step: int = 0, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one purpose at one step, or of one of several there; the global generator is never touched."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, step=step, index=index))


def seed_for(seed: int, purpose: str, *, step: int = 0, index: int = 0) -> int:
    """A 63-bit seed that differs for every combination of its arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
