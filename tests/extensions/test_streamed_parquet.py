"""A data source and an evaluation of one's own: digits streamed from Parquet, measured when training ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recipes.digits import recipe
from shortcutflow.config import EvaluationSettings, RunConfig, with_overrides
from shortcutflow.data.digits import load_digits
from shortcutflow.data.source import DataInfo, DataSource
from shortcutflow.evaluation.generate import generate, labels_of, noise_of
from shortcutflow.launch import Options, run_recipe
from shortcutflow.run_dir import Run
from shortcutflow.seeds import generator_for
from shortcutflow.types import Batch


class ParquetRows(DataSource):
    """Rows with an image and a label; row groups come in another order in each epoch, one in memory at a time."""

    kind: Literal["parquet_rows"] = "parquet_rows"
    file: Path

    def describe(self) -> DataInfo:
        return DataInfo((1, 8, 8), 10)

    def open_stream(
        self, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
    ) -> ParquetStream:
        return ParquetStream(self.file, batch_size, seed, rank, world_size, device)


class ParquetStream:
    """Batches whose rows are a function of the seed and the position, so that a run resumes by one number."""

    def __init__(self, path: Path, batch_size: int, seed: int, rank: int, world_size: int, device: Any) -> None:
        self.file, self.damaged, self.position = pq.ParquetFile(path), set[str](), 0
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.device, self.group, self.held = device, -1, pa.table({})
        metadata = self.file.metadata
        self.samples = metadata.num_rows
        self.sizes = np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def __next__(self) -> Batch:
        batch = self.batch_at(self.position)
        self.position += self.batch_size
        return batch

    def batch_at(self, position: int, /) -> Batch:
        rows = [self.row(i) for i in range(position + self.rank, position + self.batch_size, self.world_size)]
        images = torch.tensor([row["image"] for row in rows], dtype=torch.float32).view(-1, 1, 8, 8)
        labels = torch.tensor([row["label"] for row in rows])
        return Batch((images / 8 - 1).to(self.device), labels.to(self.device), tuple(str(row["name"]) for row in rows))

    def row(self, position: int) -> dict[str, Any]:
        epoch, place = divmod(position, self.samples)
        order = torch.randperm(len(self.sizes), generator=generator_for(self.seed, "row groups", step=epoch)).numpy()
        ends = self.sizes[order].cumsum()
        at = int(np.searchsorted(ends, place, side="right"))
        if order[at] != self.group:
            self.group, self.held = int(order[at]), self.file.read_row_group(int(order[at]))
        return self.held.slice(place - int(ends[at] - self.sizes[order[at]]), 1).to_pylist()[0]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class NearestMeans(EvaluationSettings):
    """Share of samples that are nearest to the mean image of their own label."""

    kind: Literal["nearest_means"] = "nearest_means"
    samples: int = 200

    def check(self, config: RunConfig) -> None:
        if config.data.describe().shape != (1, 8, 8):
            raise ValueError(f"nearest_means is for digits, not for data of kind {config.data.kind!r}")

    def run(self, run: Run) -> dict[str, Any]:
        images, labels = (torch.from_numpy(part) for part in load_digits())
        means = torch.stack([images[labels == label].mean(0).flatten() for label in range(10)])
        noise, y = noise_of(run.config.seed, self.samples, run.info.shape), labels_of(self.samples, 10)
        rows = []
        for steps in (1, 4):
            made = generate(run.network, noise, y, steps=steps, **run.config.sampler_options(run.info))
            nearest = torch.cdist(made.flatten(1), means).argmin(1)
            rows.append({"steps": steps, "values": {"nearest": float((nearest == y).float().mean())}})
        return {"rows": rows}


def test_trains_resumes_and_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = load_digits()
    rows = {"image": list(((images + 1) * 8).reshape(-1, 64)), "label": labels, "name": np.arange(len(labels))}
    pq.write_table(pa.table(rows), tmp_path / "digits.parquet", row_group_size=300)
    small = ["backbone.options.width=32", "backbone.options.depth=2", "training.steps=300", "training.grid_every=0"]
    data, evaluation = ParquetRows(file=tmp_path / "digits.parquet"), NearestMeans()
    config = with_overrides(recipe().model_copy(update={"data": data, "evaluation": evaluation}), small)
    whole = run_recipe(config, [], Options(run_dir=tmp_path / "whole"))
    (_, four) = json.loads((tmp_path / "whole/evaluation-nearest_means.json").read_text())["rows"]
    assert four["values"]["nearest"] > 0.5, "chance is 0.1"
    assert "nearest" in capsys.readouterr().out
    part = run_recipe(config, ["training.steps=200", "optimizer.schedule=constant"], Options(run_dir=tmp_path / "part"))
    run_recipe(config, ["training.steps=300"], Options(run_dir=part, resume=True))
    run_recipe(config, ["optimizer.schedule=constant"], Options(run_dir=tmp_path / "unbroken"))
    ends = [(tmp_path / name / "weights.safetensors").read_bytes()[-4096:] for name in ("part", "unbroken")]
    assert ends[0] == ends[1]
    assert whole is not None
