"""Plots of a network, compared with what a network that is known exactly must give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from recipes.digits import paper_recipe as recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.digits import DigitsData
from shortcutflow.data.source import DataInfo, DataSource
from shortcutflow.data.stream import BatchStream
from shortcutflow.evaluation.decode import ImageDecoder
from shortcutflow.evaluation.evaluate import training_images
from shortcutflow.evaluation.generate import fresh_noise_of, generate, initial_noise, noise_of
from shortcutflow.evaluation.plots import (
    interpolated_samples,
    interpolation_image,
    mixed_noise,
    nearest_neighbours,
    neighbours_image,
    neighbours_in_data,
    reconstruction_rows,
    trajectory_rows,
    x1_image,
    x1_predictions,
)
from shortcutflow.evaluation.sample_grid import image_grid
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.models.model import Model
from shortcutflow.train.visualize import visualize
from shortcutflow.types import Batch
from tests.core.gaussian import Gaussian
from tests.evaluation.evaluating import model_of, plain_model

INFO = DataInfo((1, 4, 4), 10)
SHAPE = INFO.shape


def made(net: Any, **options: Any) -> Model:
    return model_of(net, INFO, **options)


class Recorder:
    """Where all data is one datum, the exact network for every step, which keeps the t and d of its inputs."""

    def __init__(self, datum: Tensor) -> None:
        self.datum = datum
        self.inputs: list[tuple[float, float]] = []

    def __call__(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        self.inputs += zip(t.tolist(), d.tolist(), strict=True)
        return (self.datum - x_t) / (1 - t).to(x_t).view(-1, 1, 1, 1)


def datum() -> Tensor:
    return torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, *SHAPE)


def gaussian_noise(data: Gaussian, rows: int) -> Tensor:
    return data.noise(rows, torch.Generator().manual_seed(0))


def count_of(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour, dtype=np.uint8)).all(-1).sum())


@pytest.mark.parametrize(
    ("t", "sizes"),
    [
        (0.0, [1.0]),
        (0.5, [0.5]),
        (0.125, [0.125, 0.25, 0.5]),
        (0.375, [0.125, 0.5]),
        (127 / 128, [1 / 128]),
        (1 / 128, [1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]),
        (1.0, []),
    ],
)
def test_the_fewest_steps_that_training_knows(t: float, sizes: list[float]) -> None:
    net, noise = Recorder(datum()), noise_of(0, 1, SHAPE).double()
    x_1 = x1_predictions(made(net), noise, torch.tensor([t]), None)["steps"]
    assert [d for _, d in net.inputs if d > 0] == sizes
    torch.testing.assert_close(x_1, noise if t == 1 else net.datum)


@pytest.mark.parametrize("t", [0.3, 1 / 256, -0.5, 1.5])
def test_no_steps_from_other_times(t: float) -> None:
    with pytest.raises(ValueError, match="multiples of 1/128"):
        x1_predictions(made(Recorder(datum())), noise_of(0, 2, SHAPE), torch.tensor([0, t]), None)


def test_trajectory_of_one_datum() -> None:
    x_1, noise = datum(), noise_of(0, 3, SHAPE).double()
    net = Recorder(x_1)
    times, rows = trajectory_rows(made(net), noise, None, steps=8)
    assert times.tolist() == [i / 8 for i in range(9)]
    assert list(rows) == ["x_t", "flow", "steps"]
    for t, x_t, by_flow, by_steps in zip(times.tolist(), *rows.values(), strict=True):
        torch.testing.assert_close(x_t, (1 - t) * noise + t * x_1)
        torch.testing.assert_close(by_flow, x_1.expand_as(noise))
        torch.testing.assert_close(by_steps, x_1.expand_as(noise))
    steps = [(t, d) for t, d in net.inputs if d > 0]
    assert all(math.log2(d).is_integer() and t % d == 0 and t + d <= 1 for t, d in steps), "as in training"
    assert {d for _, d in steps} == {1, 1 / 2, 1 / 4, 1 / 8}


def test_predictions_of_an_exact_network() -> None:
    data = Gaussian.example(*SHAPE)
    noise = gaussian_noise(data, 5)
    times, rows = trajectory_rows(made(data.net()), noise, None, steps=8)
    exact = data.flow_map(noise, torch.zeros(5), torch.ones(5))
    torch.testing.assert_close(rows["steps"], exact.expand_as(rows["steps"]), rtol=0, atol=1e-12)
    for t, x_t, x_1 in zip(times[:-1].tolist(), rows["x_t"], rows["flow"], strict=False):
        torch.testing.assert_close(x_1, x_t + (1 - t) * data.velocity(x_t, torch.full((5,), t)))
    # What the flow predicts from noise is a mean, no sample; and only the exact network predicts the same from all.
    assert (rows["flow"][0] - exact).abs().max() > 0.5
    wrong = made(lambda x_t, t, d, y: data.velocity(x_t, t))
    _, rows = trajectory_rows(wrong, noise, None, steps=8)
    assert (rows["steps"][0] - rows["steps"][-1]).abs().max() > 0.1


def test_trajectory_shows_some_of_many_states() -> None:
    data = Gaussian.example(*SHAPE)
    noise = gaussian_noise(data, 2)
    times, rows = trajectory_rows(made(data.net()), noise, None, steps=128, columns=5)
    assert times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(rows["x_t"][0], noise)
    assert torch.equal(rows["x_t"][-1], generate(made(data.net()), noise, None, steps=128))


def test_a_flow_knows_no_steps() -> None:
    net, noise = Recorder(datum()), noise_of(0, 1, SHAPE).double()
    _, rows = trajectory_rows(made(net, flow_only=True), noise, None, steps=256)
    assert list(rows) == ["x_t", "flow"]
    assert {d for _, d in net.inputs} == {0.0}
    with pytest.raises(ValueError, match=r"at most 128.*got 256"):
        trajectory_rows(made(net), noise, None, steps=256)
    with pytest.raises(ValueError, match="columns must be at least 2"):
        trajectory_rows(made(net), noise, None, steps=2, columns=1)


def test_consistency_models_predict_by_the_step_to_the_end_alone() -> None:
    net, noise = Recorder(datum() / 2), noise_of(5, 4, SHAPE).double()
    _, rows = trajectory_rows(made(net, sampler="consistency"), noise, None, steps=4, seed=5)
    assert list(rows) == ["x_t", "steps"]
    assert all(d == 1 - t for t, d in net.inputs)
    torch.testing.assert_close(rows["steps"], net.datum.expand_as(rows["steps"]))

    # A network that is not exact, so that the noise added on the way is seen in the sample.
    def rough(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        return torch.sin(x_t)

    sampled = generate(made(rough, sampler="consistency"), noise, None, steps=4, seed=5)
    for seed in (5, 6):
        _, rows = trajectory_rows(made(rough, sampler="consistency"), noise, None, steps=4, seed=seed)
        assert torch.equal(rows["x_t"][-1], sampled) == (seed == 5)


def test_live_reflow_predicts_by_one_of_two_flows() -> None:
    net = Recorder(datum())
    trajectory_rows(made(net, sampler="live_reflow"), noise_of(0, 1, SHAPE).double(), None, steps=8)
    assert {d for _, d in net.inputs} == {0.0, 1.0}


def test_reconstruction() -> None:
    data = Gaussian.example(*SHAPE)
    real, noise = data.draw(3, torch.Generator().manual_seed(1)), gaussian_noise(data, 3)
    times, rows = reconstruction_rows(made(data.net()), real, noise, None)
    assert times.tolist() == [0, *(1 - 2.0**-k for k in range(1, 8)), 1]
    for t, x_t, by_flow, by_steps in zip(times[:-1].tolist(), *rows.values(), strict=False):
        now, one = torch.full((3,), t), torch.ones(3)
        torch.testing.assert_close(x_t, (1 - t) * noise + t * real)
        torch.testing.assert_close(by_steps, data.flow_map(x_t, now, one))
        torch.testing.assert_close(by_flow, x_t + (1 - t) * data.velocity(x_t, now))
    assert all(torch.equal(row[-1], real) for row in rows.values())
    fewer, some = reconstruction_rows(made(data.net()), real, noise, None, columns=5)
    assert fewer.tolist() == [0, 3 / 4, 15 / 16, 31 / 32, 127 / 128, 1]
    assert torch.equal(some["x_t"], rows["x_t"][[0, 2, 4, 5, 7, 8]])


def test_reconstruction_evaluates_each_step_size_once() -> None:
    net = Recorder(datum())
    reconstruction_rows(made(net), datum(), noise_of(0, 1, SHAPE).double(), None)
    times = [1 - 2.0**-k for k in range(8)]
    assert net.inputs == [*((t, 0.0) for t in times), *((t, 1 - t) for t in times)]


def test_labels_go_with_their_samples() -> None:
    def by_label(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return y.view(-1, 1, 1, 1) - x_t + torch.zeros_like(x_t)

    y = torch.tensor([2, 7, 5])
    real = torch.zeros(3, *SHAPE)
    _, rows = reconstruction_rows(made(by_label), real, noise_of(0, 3, SHAPE), y)
    torch.testing.assert_close(rows["steps"][0], y.view(-1, 1, 1, 1).expand_as(real).float())
    noise, pair_labels = initial_noise(made(None), labels=y.tolist(), noises_per_label=2)
    samples = interpolated_samples(made(by_label), noise, pair_labels, columns=3)
    torch.testing.assert_close(samples, y.view(-1, 1, 1, 1, 1).expand_as(samples).float())


def test_between_two_noises() -> None:
    a, b = noise_of(0, 200, SHAPE), noise_of(1, 200, SHAPE)
    path = [mixed_noise(a, b, i / 4) for i in range(5)]
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    torch.testing.assert_close(path[2], (a + b) / math.sqrt(2))
    torch.testing.assert_close(path[1], math.cos(math.pi / 8) * a + math.sin(math.pi / 8) * b)
    # The straight line between them is no noise: its middle has half the variance.
    assert all(abs(float(x.var()) - 1) < 0.1 for x in path)
    assert abs(float(((a + b) / 2).var()) - 0.5) < 0.1
    with pytest.raises(ValueError, match="columns must be at least 2"):
        interpolated_samples(made(lambda x_t, t, d, y: x_t), a, None, columns=1)


@pytest.mark.parametrize("steps", [1, 3])
def test_interpolation_ends_at_the_samples(steps: int) -> None:
    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return torch.sin(x_t) + (t + d + y).view(-1, 1, 1, 1)

    noise, y = initial_noise(made(None), count=3, noises_per_label=2, seed=4)
    assert y is not None
    assert torch.equal(noise, noise_of(4, 6, SHAPE))
    between = interpolated_samples(made(net), noise, y, columns=5, steps=steps)
    assert between.shape == (3, 5, *SHAPE)
    whole = generate(made(net), noise, y.repeat_interleave(2), steps=steps)
    torch.testing.assert_close(between[:, 0], whole[0::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(between[:, -1], whole[1::2], rtol=0, atol=1e-6)
    assert (between[:, 2] - whole[0::2]).abs().max() > 0.1


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_nearest_is_exact_in_blocks_of_any_size(block: int) -> None:
    data, queries = noise_of(0, 200, SHAPE), noise_of(1, 6, SHAPE)
    data[123] = queries[4]
    distance, position = nearest_neighbours(queries, data.split(block), 3)
    every = (queries[:, None] - data).flatten(2).square().mean(-1).sqrt()
    expected = every.sort(dim=1)
    torch.testing.assert_close(distance, expected.values[:, :3])
    assert torch.equal(position, expected.indices[:, :3])
    assert float(distance[4, 0]) == 0.0
    assert float(distance[[0, 1, 2, 3, 5], 0].min()) > 0.3


def test_too_little_data_for_neighbours() -> None:
    data = noise_of(0, 4, SHAPE)
    assert nearest_neighbours(data, [data], 4)[0].shape == (4, 4)
    with pytest.raises(ValueError, match="nearest is 5, but there are only 4"):
        nearest_neighbours(data, [data], 5)
    with pytest.raises(ValueError, match="nearest must be at least 1"):
        nearest_neighbours(data, [data], 0)
    with pytest.raises(ValueError, match="shape"):
        nearest_neighbours(data, [noise_of(0, 2, (1, 2, 2))], 1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitsData:
    return DigitsData(folder=tmp_path_factory.mktemp("data") / "digits")


def test_an_epoch_has_every_sample_once(digits: DigitsData) -> None:
    blocks = list(digits.one_epoch(batch_size=500))
    assert [len(block.data) for block in blocks] == [500, 500, 500, 297]
    keys = [key for block in blocks for key in block.keys]
    assert len(set(keys)) == len(keys) == 1797
    assert torch.cat([block.data for block in blocks]).aminmax() == (-1, 1)
    some = digits.first(4, seed=3)
    assert some.keys == digits.first(4, seed=3).keys != digits.first(4, seed=4).keys


class TenNumbers:
    """A stream of somebody else: sample i is i everywhere, and the seed moves the first."""

    samples, damaged = 10, set[str]()

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed

    def __next__(self) -> Batch:
        raise NotImplementedError

    def batch_at(self, position: int) -> Batch:
        numbers = torch.arange(position + self.seed, position + self.seed + self.batch_size) % 10
        return Batch(numbers.view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 10, None, tuple(map(str, numbers.tolist())))

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Foreign(DataSource):
    kind: Literal["foreign"] = "foreign"

    def describe(self) -> DataInfo:
        return DataInfo((1, 8, 8), None)

    def open_stream(self, *, batch_size: int, seed: int, **_: Any) -> BatchStream:
        return TenNumbers(batch_size, seed)


def test_a_foreign_stream_is_drawn_and_its_reference_must_be_named() -> None:
    data = Foreign()
    assert data.first(3, seed=2).keys == ("2", "3", "4")
    assert [key for block in data.one_epoch(batch_size=4) for key in block.keys] == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="'foreign', which is a stream and no folder of shards: name images or"):
        training_images(Sampler(plain_model(data=data)))


def test_a_copied_digit_is_found(digits: DigitsData) -> None:
    real = digits.first(3, seed=1)
    samples = torch.cat([real.data, noise_of(0, 2, (1, 8, 8))])
    distance, found, among_data = neighbours_in_data(digits, samples, 2)
    assert distance[:3, 0].tolist() == [0, 0, 0]
    assert torch.equal(found[:3, 0], real.data)
    difference = (found - samples[:, None]).flatten(2).square().mean(-1).sqrt()
    torch.testing.assert_close(difference, distance)
    assert float(distance[3:, 0].min()) > 0.7
    assert 0.15 < among_data < 0.35
    some = next(digits.one_epoch(batch_size=64)).data
    every = torch.cat([batch.data for batch in digits.one_epoch()]).flatten(1)
    apart = torch.cdist(some.flatten(1), every, compute_mode="donot_use_mm_for_euclid_dist") / 8
    apart[range(64), range(64)] = torch.inf  # the first samples of an epoch, and themselves
    assert among_data == pytest.approx(float(apart.min(1).values.mean()), rel=1e-6)
    images = torch.cat([samples[:, None], found], dim=1)
    image = neighbours_image(images, distance, torch.arange(5), title="")
    assert image.std() > 20
    assert not np.array_equal(neighbours_image(images, distance + 1, torch.arange(5), title=""), image)


def test_texts_cover_no_image() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
    images = [torch.tensor(colour).view(3, 1, 1) / 127.5 - 1 + torch.zeros(3, 4, 4) for colour in colours]
    rows = [torch.stack(images[:2]), torch.stack(images[2:4]), torch.stack(images[4:])]
    titles = ["a", "longer\n0.123", "c"]
    picture = image_grid(
        rows, titles, cell=12, column_titles=["t = 127/128\nd = 1/128", "x"], group=1, title="many words " * 20
    )
    assert [count_of(picture, colour) for colour in colours] == [12 * 12] * 6
    plain = image_grid(rows, titles, cell=12)
    assert picture.shape[0] > plain.shape[0] + 3 * 18
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all(), "texts and images keep inside the picture"


def test_columns_show_the_states() -> None:
    reds = [0, 51, 102, 153, 204, 255]  # one a kind and time, which no grey of a text is
    colours = torch.tensor([[red, 200, 100] for red in reds]) / 127.5 - 1
    values = colours.view(3, 2, 1, 3, 1, 1).expand(3, 2, 1, 3, 4, 4)
    t, rows = torch.tensor([0.0, 0.5]), dict(zip(("x_t", "flow", "steps"), values, strict=True))
    picture = x1_image(t, rows, None, title="")
    corners = []
    for red in reds:
        y, x = np.nonzero((picture == (red, 200, 100)).all(-1))
        assert len(y) == 64 * 64
        corners.append((int(y.min()), int(x.min())))
    tops, lefts = sorted({y for y, _ in corners}), sorted({x for _, x in corners})
    assert corners == [(top, left) for top in tops for left in lefts], "a row a kind, a column a time"
    assert x1_image(t, {"x_t": values[0], "flow": values[1]}, None, title="").shape[0] < picture.shape[0]


def test_images_of_a_network() -> None:
    data = Gaussian.example(*SHAPE)
    model, (_, y) = made(data.net()), initial_noise(made(None), labels=[3, 1])
    noise, one = gaussian_noise(data, 2), torch.tensor([3])
    drawn = {
        "trajectory": x1_image(*trajectory_rows(model, noise, y, steps=4), y, title="A title."),
        "reconstruction": x1_image(
            *reconstruction_rows(model, noise / 2, noise, y), y, title="A title.", with_step_size=True
        ),
        "interpolation": interpolation_image(
            {s: interpolated_samples(model, noise, one, steps=s) for s in (1, 4)}, one
        ),
    }
    for name, image in drawn.items():
        height, width, channels = image.shape
        assert (image.dtype, channels) == (np.uint8, 3)
        assert 100 < height < 1000, name
        assert 300 < width < 1000, name
        assert image.std() > 20, name


def test_initial_noise() -> None:
    noise, y = initial_noise(made(None), labels=[3, 1], seed=2)
    assert torch.equal(noise, noise_of(2, 2, SHAPE))
    assert y is not None
    assert y.tolist() == [3, 1]
    fresh = fresh_noise_of(0, [5, 2], noise)
    assert torch.equal(fresh(1), fresh_noise_of(0, [2, 5], noise)(1).flip(0))
    assert not torch.equal(fresh(1), fresh(2))
    for options, message in (
        ({"labels": [10]}, "labels must be from 0 to 9, got 10"),
        ({"labels": [1], "count": 2}, "labels or a count"),
        ({"count": 0}, "must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            initial_noise(made(None), **options)
    with pytest.raises(ValueError, match="trained without labels"):
        initial_noise(model_of(None, DataInfo(SHAPE, None)), labels=[1])
    with pytest.raises(ValueError, match=r"only images can be drawn.*\(16, 2\)"):
        initial_noise(model_of(None, DataInfo((16, 2), None)))


def tiny(folder: Path, *overrides: str) -> RunConfig:
    small = ["backbone.options.width=16", "backbone.options.depth=1", "training.grid_steps=[1,2]", "evaluation=null"]
    return with_overrides(recipe(), [*small, f"data.folder={folder}", *overrides])


class Kept(ImageDecoder):
    """Keeps what it decodes."""

    def __call__(self, *groups: Tensor) -> list[Tensor]:
        self.calls = [*getattr(self, "calls", []), groups]
        return super().__call__(*groups)


@pytest.mark.parametrize("objective", ["shortcut", "flow_matching", "consistency_training", "live_reflow"])
def test_images_while_training(objective: str, digits: DigitsData, tmp_path: Path) -> None:
    config = tiny(digits.folder, f"objective.kind={objective}")
    network = config.build_network().train()
    # At first a network says nothing at all.
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    device, info = torch.device("cpu"), config.data.describe()
    decoder = Kept(info, device)
    file = tmp_path / "grids" / "step_7.png"
    assert visualize(config, info, network, device, None, file) == {}
    assert not file.exists()
    images = visualize(config, info, network, device, decoder, file)
    again = visualize(config, info, network, device, decoder, file)
    assert network.training
    assert list(images) == ["samples", "reconstruction", "interpolation"]
    assert np.array_equal(np.asarray(Image.open(file)), images["samples"])
    # The interpolation, two rows of samples, and as many of predictions as the network has.
    first, second = decoder.calls
    assert len(first) == 1 + 2 + 1 + (objective != "consistency_training") + (objective != "flow_matching")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for name, image in images.items():
        assert image.dtype == np.uint8, name
        assert image.std() > 10, name
        assert np.array_equal(image, again[name]), name
