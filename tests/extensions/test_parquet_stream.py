"""(e) Hugging Face's parquet files, streamed and shuffled by their own library; any position is gone to exactly."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import shortcutflow as sf
from recipes.digits import paper_recipe as recipe
from shortcutflow.config import with_overrides
from shortcutflow.data.source import DataInfo, DataSource
from shortcutflow.models.model import load
from shortcutflow.train.loop import train

datasets: Any = pytest.importorskip("datasets")
parquet: Any = pytest.importorskip("pyarrow.parquet")
digits = pytest.importorskip("sklearn.datasets").load_digits()

# ---- the package


class ParquetStreamData(DataSource):
    """Grey images in parquet files with the columns ``image`` and ``label``."""

    kind: Literal["parquet_stream"] = "parquet_stream"
    files: tuple[str, ...]

    def rows(self) -> Any:
        return datasets.load_dataset("parquet", data_files=list(self.files), split="train", streaming=True)

    def describe(self) -> DataInfo:
        width, height = next(iter(self.rows()))["image"].size
        return DataInfo((1, height, width), self.rows().features["label"].num_classes)

    def open_stream(
        self, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, device: Any = "cpu"
    ) -> Any:
        return ParquetStream(self, batch_size, seed, slice(rank, None, world_size), device)


class ParquetStream:
    """Global batches in the order of ``datasets``, a function of (seed, epoch); each rank reads all, takes its rows."""

    def __init__(self, data: ParquetStreamData, batch_size: int, seed: int, ranks: slice, device: Any) -> None:
        self.samples, self.damaged = sum(parquet.read_metadata(file).num_rows for file in data.files), set[str]()
        # One file at a time: with several, datasets waits five seconds for its threads at the end of each epoch.
        self._rows = data.rows().shuffle(seed=seed, buffer_size=500, max_buffer_input_shards=1)
        self._batch_size, self._ranks, self._device = batch_size, ranks, device
        self._position, self._coming = 0, self._from(0)

    def __next__(self) -> sf.Batch:
        self._position += self._batch_size
        return self._batch(self._coming)

    def batch_at(self, position: int) -> sf.Batch:
        return self._batch(self._from(position))

    def state_dict(self) -> dict[str, int]:
        return {"samples_seen": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position, self._coming = state["samples_seen"], self._from(state["samples_seen"])

    def _from(self, position: int) -> Iterator[dict[str, Any]]:
        for epoch in count(position // self.samples):
            rows = self._rows.skip(max(0, position - epoch * self.samples))
            rows.set_epoch(epoch)
            yield from rows

    def _batch(self, coming: Iterator[dict[str, Any]]) -> sf.Batch:
        rows = list(islice(coming, self._batch_size))[self._ranks]
        images = torch.from_numpy(np.stack([np.asarray(row["image"]) for row in rows]))[:, None].to(self._device)
        return sf.Batch(images / 127.5 - 1, torch.tensor([row["label"] for row in rows], device=self._device))


# ---- what is checked


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ParquetStreamData:
    columns = {"image": list(np.round(digits.images * 255 / 16).astype(np.uint8)), "label": digits.target.tolist()}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    files = tuple(str(tmp_path_factory.mktemp("parquet") / f"digits-{i}.parquet") for i in range(3))
    for i, file in enumerate(files):
        datasets.Dataset.from_dict(columns, features=features).shard(3, i).to_parquet(file)
    return ParquetStreamData(files=files)


def test_each_row_once_an_epoch_and_exact_positions(data: ParquetStreamData) -> None:
    stream = data.open_stream(batch_size=64, seed=3)
    batches = [next(stream) for _ in range(60)]
    rows = ((torch.cat([batch.data for batch in batches]).flatten(1) + 1) * 8).round()
    first, second = (rows[i * stream.samples :][: stream.samples].tolist() for i in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(digits.data.tolist())
    for number in (0, 5, 28, 40):  # the 28th runs over the end of the first epoch
        assert torch.equal(stream.batch_at(64 * number).data, batches[number].data)
        share = data.open_stream(batch_size=64, seed=3, rank=1, world_size=2)
        share.load_state_dict({"samples_seen": 64 * number})
        assert torch.equal(next(share).data, batches[number].data[1::2])
        assert torch.equal(next(share).y, batches[number + 1].y[1::2])


@pytest.mark.slow
def test_samples_show_their_digits(data: ParquetStreamData, tmp_path: Path) -> None:
    options = ["training.steps=600", "training.grid_every=0", "optimizer.warm_up_steps=20", "evaluation=null"]
    options += ["backbone.options.depth=2", "objective.condition_dropout=0.0", "objective.bootstrap_fraction=0.125"]
    train(with_overrides(recipe().model_copy(update={"data": data}), options), tmp_path)
    reader = pytest.importorskip("sklearn.svm").SVC().fit(digits.data / 8 - 1, digits.target)
    y = torch.arange(200) % 10
    x = sf.sample(load(tmp_path).network, (200, 1, 8, 8), y, steps=8, generator=torch.Generator().manual_seed(1))
    assert (reader.predict(x.flatten(1).numpy()) == y.numpy()).mean() > 0.7, "chance is 0.1"
