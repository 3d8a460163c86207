"""Real data for pictures: some samples, or all of them once, in blocks."""

from __future__ import annotations

from collections.abc import Iterator

from shortcutflow.data.source import DataSettings
from shortcutflow.data.stream import BatchStream
from shortcutflow.types import Batch


def some_data(settings: DataSettings, count: int, *, seed: int = 0) -> Batch:
    """The first samples of the first epoch in a seed's order, not mirrored, the same in every process.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return _stream(settings, batch_size=count, seed=seed).batch_at(0)


def all_data(settings: DataSettings, *, block: int = 512) -> Iterator[Batch]:
    """Every sample once, not mirrored, in blocks of so many, of which no two are held; always in the same order.

    Latents are those of one draw.
    """
    stream = _stream(settings, batch_size=block, seed=0)
    for start in range(0, stream.samples, block):
        batch, left = stream.batch_at(start), stream.samples - start
        # The last block goes on into the next epoch.
        yield Batch(batch.data[:left], None if batch.y is None else batch.y[:left], batch.keys[:left])


def _stream(settings: DataSettings, *, batch_size: int, seed: int) -> BatchStream:
    still = settings.model_copy(update={"workers": 0, "cache_bytes": 0, "horizontal_flip": False})
    return still.open_stream(batch_size=batch_size, seed=seed)
