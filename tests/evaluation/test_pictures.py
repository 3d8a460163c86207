"""Pictures of a network, compared with what a network that is known exactly must give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.digits import recipe
from shortcutflow.config import RunConfig, with_overrides
from shortcutflow.data.digits import DigitsData
from shortcutflow.data.source import DataInfo, DataSettings
from shortcutflow.data.stream import BatchStream
from shortcutflow.evaluation.decoded import ImageDecoder
from shortcutflow.evaluation.drawing.ends import Ends, draw_ends, names_of
from shortcutflow.evaluation.drawing.grids import sample_grid
from shortcutflow.evaluation.drawing.interpolation import between, interpolate_samples, interpolation_picture
from shortcutflow.evaluation.drawing.neighbours import nearest_of, neighbours_in, neighbours_picture, said
from shortcutflow.evaluation.drawing.predictor import Predictor, shortest_way
from shortcutflow.evaluation.drawing.real import all_data, some_data
from shortcutflow.evaluation.drawing.reconstruction import reconstruct, reconstruction_picture
from shortcutflow.evaluation.drawing.starts import pairs_of, starts_of
from shortcutflow.evaluation.drawing.trajectories import follow, trajectory_picture
from shortcutflow.evaluation.evaluate import pictures_of
from shortcutflow.evaluation.generate import fresh_noise_of, generate, noise_of
from shortcutflow.evaluation.samples import Sampler
from shortcutflow.train.pictures import save_pictures, training_pictures
from shortcutflow.types import Batch
from tests.core.gaussian import Gaussian
from tests.evaluation.evaluating import plain_subject

INFO = DataInfo((1, 4, 4), 10)
SHAPE = INFO.shape


class Recorder:
    """Where all data is one datum, the exact network for every step, which keeps what it was asked."""

    def __init__(self, datum: Tensor) -> None:
        self.datum = datum
        self.asked: list[tuple[float, float]] = []

    def __call__(self, x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        self.asked += zip(t.tolist(), d.tolist(), strict=True)
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
def test_shortest_way(t: float, sizes: list[float]) -> None:
    assert shortest_way(t, 128) == sizes


@pytest.mark.parametrize("t", [0.3, 1 / 256, -0.5, 1.5])
def test_no_way_from_other_times(t: float) -> None:
    with pytest.raises(ValueError, match="multiple of 1/128"):
        shortest_way(t, 128)


def test_trajectory_of_one_datum() -> None:
    x_1, noise = datum(), noise_of(0, 3, SHAPE).double()
    net = Recorder(x_1)
    ends = follow(Predictor(net), noise, None, steps=8)
    assert ends.t == [i / 8 for i in range(9)]
    assert ends.by_flow is not None
    assert ends.by_steps is not None
    for t, x_t, by_flow, by_steps in zip(ends.t, ends.x_t, ends.by_flow, ends.by_steps, strict=True):
        torch.testing.assert_close(x_t, (1 - t) * noise + t * x_1)
        torch.testing.assert_close(by_flow, x_1.expand_as(noise))
        torch.testing.assert_close(by_steps, x_1.expand_as(noise))
    told = [(t, d) for t, d in net.asked if d > 0]
    assert all(math.log2(d).is_integer() and t % d == 0 and t + d <= 1 for t, d in told), "as in training"
    assert {d for _, d in told} == {1, 1 / 2, 1 / 4, 1 / 8}


def test_ends_of_an_exact_network() -> None:
    data = Gaussian.example(*SHAPE)
    noise = gaussian_noise(data, 5)
    ends = follow(Predictor(data.net()), noise, None, steps=8)
    assert ends.by_flow is not None
    assert ends.by_steps is not None
    exact = data.flow_map(noise, torch.zeros(5), torch.ones(5))
    torch.testing.assert_close(ends.by_steps, exact.expand_as(ends.by_steps), rtol=0, atol=1e-12)
    for t, x_t, end in zip(ends.t[:-1], ends.x_t, ends.by_flow, strict=False):
        torch.testing.assert_close(end, x_t + (1 - t) * data.velocity(x_t, torch.full((5,), t)))
    # What the flow says from noise is a mean, no sample; and only the exact network's ends are all the same.
    assert (ends.by_flow[0] - exact).abs().max() > 0.5
    wrong = Predictor(lambda x_t, t, d, y: data.velocity(x_t, t))
    ends = follow(wrong, noise, None, steps=8)
    assert ends.by_steps is not None
    assert (ends.by_steps[0] - ends.by_steps[-1]).abs().max() > 0.1


def test_trajectory_shows_some_of_many_states() -> None:
    data = Gaussian.example(*SHAPE)
    noise = gaussian_noise(data, 2)
    ends = follow(Predictor(data.net()), noise, None, steps=128, columns=5)
    assert ends.t == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(ends.x_t[0], noise)
    assert torch.equal(ends.x_t[-1], Predictor(data.net()).sample(noise, None, steps=128))


def test_a_flow_knows_no_steps() -> None:
    net = Recorder(datum())
    ends = follow(Predictor(net, flow_only=True), noise_of(0, 1, SHAPE).double(), None, steps=256)
    assert ends.by_steps is None
    assert {d for _, d in net.asked} == {0.0}
    with pytest.raises(ValueError, match=r"at most 128.*got 256"):
        follow(Predictor(net), noise_of(0, 1, SHAPE).double(), None, steps=256)
    with pytest.raises(ValueError, match="columns must be at least 2"):
        follow(Predictor(net), noise_of(0, 1, SHAPE).double(), None, steps=2, columns=1)


def test_consistency_models_are_asked_for_the_end_alone() -> None:
    net, noise = Recorder(datum() / 2), noise_of(5, 4, SHAPE).double()
    predictor = Predictor(net, sampler="consistency")
    ends = follow(predictor, noise, None, steps=4, seed=5)
    assert ends.by_flow is None
    assert ends.by_steps is not None
    assert all(d == 1 - t for t, d in net.asked)
    torch.testing.assert_close(ends.by_steps, net.datum.expand_as(ends.by_steps))
    # A network that is not exact, so that the noise added on the way is seen in the sample.
    rough = Predictor(lambda x_t, t, d, y: torch.sin(x_t), sampler="consistency")
    sampled = generate(rough.net, noise, None, steps=4, sampler="consistency", seed=5)
    assert torch.equal(follow(rough, noise, None, steps=4, seed=5).x_t[-1], sampled)
    assert not torch.equal(follow(rough, noise, None, steps=4, seed=6).x_t[-1], sampled)


def test_live_reflow_is_told_one_of_two_flows() -> None:
    net = Recorder(datum())
    follow(Predictor(net, sampler="live_reflow"), noise_of(0, 1, SHAPE).double(), None, steps=8)
    assert {d for _, d in net.asked} == {0.0, 1.0}


def test_reconstruction() -> None:
    data = Gaussian.example(*SHAPE)
    real, noise = data.draw(3, torch.Generator().manual_seed(1)), gaussian_noise(data, 3)
    ends = reconstruct(Predictor(data.net()), real, noise, None)
    assert ends.t == [0, *(1 - 2.0**-k for k in range(1, 8)), 1]
    assert ends.by_flow is not None
    assert ends.by_steps is not None
    for t, x_t, by_flow, by_steps in zip(ends.t[:-1], ends.x_t, ends.by_flow, ends.by_steps, strict=False):
        now, one = torch.full((3,), t), torch.ones(3)
        torch.testing.assert_close(x_t, (1 - t) * noise + t * real)
        torch.testing.assert_close(by_steps, data.flow_map(x_t, now, one))
        torch.testing.assert_close(by_flow, x_t + (1 - t) * data.velocity(x_t, now))
    for column in (ends.x_t, ends.by_flow, ends.by_steps):
        assert torch.equal(column[-1], real)


def test_reconstruction_asks_each_size_once() -> None:
    net = Recorder(datum())
    reconstruct(Predictor(net), datum(), noise_of(0, 1, SHAPE).double(), None)
    times = [1 - 2.0**-k for k in range(8)]
    assert net.asked == [*((t, 0.0) for t in times), *((t, 1 - t) for t in times)]


def test_labels_go_with_their_samples() -> None:
    def told(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return y.view(-1, 1, 1, 1) - x_t + torch.zeros_like(x_t)

    y = torch.tensor([2, 7, 5])
    real = torch.zeros(3, *SHAPE)
    ends = reconstruct(Predictor(told), real, noise_of(0, 3, SHAPE), y)
    assert ends.by_steps is not None
    torch.testing.assert_close(ends.by_steps[0], y.view(-1, 1, 1, 1).expand_as(real).float())
    noise, pair_labels = pairs_of(INFO, labels=y.tolist())
    made = interpolate_samples(Predictor(told), noise, pair_labels, columns=3)
    torch.testing.assert_close(made, y.view(-1, 1, 1, 1, 1).expand_as(made).float())


def test_between_two_noises() -> None:
    a, b = noise_of(0, 200, SHAPE), noise_of(1, 200, SHAPE)
    path = between(a, b, 5)
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    torch.testing.assert_close(path[2], (a + b) / math.sqrt(2))
    torch.testing.assert_close(path[1], math.cos(math.pi / 8) * a + math.sin(math.pi / 8) * b)
    # The straight line between them is no noise: its middle has half the variance.
    assert all(abs(float(x.var()) - 1) < 0.1 for x in path)
    assert abs(float(((a + b) / 2).var()) - 0.5) < 0.1
    with pytest.raises(ValueError, match="columns must be at least 2"):
        between(a, b, 1)
    with pytest.raises(ValueError, match="same shape"):
        between(a, b[:3], 3)


@pytest.mark.parametrize("steps", [1, 3])
def test_interpolation_ends_at_the_samples(steps: int) -> None:
    def net(x_t: Tensor, t: Tensor, d: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return torch.sin(x_t) + (t + d + y).view(-1, 1, 1, 1)

    noise, y = pairs_of(INFO, pairs=3, seed=4)
    assert y is not None
    assert torch.equal(noise, noise_of(4, 6, SHAPE))
    made = interpolate_samples(Predictor(net), noise, y, columns=5, steps=steps)
    assert made.shape == (3, 5, *SHAPE)
    whole = generate(net, noise, y.repeat_interleave(2), steps=steps)
    torch.testing.assert_close(made[:, 0], whole[0::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(made[:, -1], whole[1::2], rtol=0, atol=1e-6)
    assert (made[:, 2] - whole[0::2]).abs().max() > 0.1


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_nearest_is_exact_in_blocks_of_any_size(block: int) -> None:
    data, queries = noise_of(0, 200, SHAPE), noise_of(1, 6, SHAPE)
    data[123] = queries[4]
    found = nearest_of(queries, data.split(block), 3)
    every = (queries[:, None] - data).flatten(2).square().mean(-1).sqrt()
    expected = every.sort(dim=1)
    torch.testing.assert_close(found.distance, expected.values[:, :3])
    assert torch.equal(found.data, data[expected.indices[:, :3]])
    assert float(found.distance[4, 0]) == 0.0
    assert float(found.distance[[0, 1, 2, 3, 5], 0].min()) > 0.3


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_real_samples_leave_themselves_out(block: int) -> None:
    data = noise_of(0, 40, SHAPE)
    alone = nearest_of(data[:5], data.split(block), 2)
    others = nearest_of(data[:5], data.split(block), 1, left_out=range(5))
    assert float(alone.distance[:, 0].max()) == 0.0
    assert torch.equal(others.distance[:, 0], alone.distance[:, 1])


def test_too_little_data_for_neighbours() -> None:
    data = noise_of(0, 4, SHAPE)
    assert nearest_of(data, [data], 4).distance.shape == (4, 4)
    for nearest, left_out in ((5, ()), (4, range(4))):
        with pytest.raises(ValueError, match=f"nearest is {nearest}, but there are only {4 - bool(left_out)}"):
            nearest_of(data, [data], nearest, left_out=left_out)
    with pytest.raises(ValueError, match="nearest must be at least 1"):
        nearest_of(data, [data], 0)
    with pytest.raises(ValueError, match="shape"):
        nearest_of(data, [noise_of(0, 2, (1, 2, 2))], 1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitsData:
    return DigitsData(folder=tmp_path_factory.mktemp("data") / "digits")


def test_all_data_comes_once(digits: DigitsData) -> None:
    blocks = list(all_data(digits, block=500))
    assert [len(block.data) for block in blocks] == [500, 500, 500, 297]
    keys = [key for block in blocks for key in block.keys]
    assert len(set(keys)) == len(keys) == 1797
    assert torch.cat([block.data for block in blocks]).aminmax() == (-1, 1)
    some = some_data(digits, 4, seed=3)
    assert some.keys == some_data(digits, 4, seed=3).keys != some_data(digits, 4, seed=4).keys


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


class Foreign(DataSettings):
    kind: str = "foreign"

    def open_stream(self, *, batch_size: int, seed: int, **_: Any) -> BatchStream:
        return TenNumbers(batch_size, seed)


def test_a_foreign_stream_is_drawn_and_its_reference_must_be_named() -> None:
    data = Foreign()
    assert some_data(data, 3, seed=2).keys == ("2", "3", "4")
    assert [key for block in all_data(data, block=4) for key in block.keys] == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="'foreign', which is a stream and no folder of shards: name pictures or"):
        pictures_of(Sampler(plain_subject(data=data)))


def test_a_copied_digit_is_found(digits: DigitsData) -> None:
    real = some_data(digits, 3, seed=1)
    samples = torch.cat([real.data, noise_of(0, 2, (1, 8, 8))])
    found, real_distance = neighbours_in(digits, samples, 2)
    assert found.distance[:3, 0].tolist() == [0, 0, 0]
    assert torch.equal(found.data[:3, 0], real.data)
    assert float(found.distance[3:, 0].min()) > 0.7
    assert 0.15 < real_distance < 0.35
    assert f"{float(found.distance[:, 0].mean()):.3f}, real ones to others {real_distance:.3f}" in said(
        found, real_distance
    )
    picture = neighbours_picture(samples, found, real_distance, torch.arange(5), ImageDecoder(INFO, "cpu"))
    assert picture.std() > 20
    copy, other = found._replace(distance=found.distance + 1), found
    assert not np.array_equal(
        neighbours_picture(samples, copy, real_distance, None, ImageDecoder(INFO, "cpu")),
        neighbours_picture(samples, other, real_distance, None, ImageDecoder(INFO, "cpu")),
    )


def test_texts_cover_no_image() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
    images = [torch.tensor(colour).view(3, 1, 1) / 127.5 - 1 + torch.zeros(3, 4, 4) for colour in colours]
    rows = [torch.stack(images[:2]), torch.stack(images[2:4]), torch.stack(images[4:])]
    columns, captions = ["t = 127/128\nd = 1/128", "x"], [["a caption", "0.123"]] * 3
    picture = sample_grid(
        rows, ["a", "longer", "c"], cell=12, columns=columns, captions=captions, group=1, title="many words " * 20
    )
    assert [count_of(picture, colour) for colour in colours] == [12 * 12] * 6
    plain = sample_grid(rows, ["a", "longer", "c"], cell=12)
    assert picture.shape[0] > plain.shape[0] + 3 * 18
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all(), "texts and images keep inside the picture"


def test_columns_show_the_states() -> None:
    reds = [0, 51, 102, 153, 204, 255]  # one a kind and time, which no grey of a text is
    colours = torch.tensor([[red, 200, 100] for red in reds]) / 127.5 - 1
    values = colours.view(3, 2, 1, 3, 1, 1).expand(3, 2, 1, 3, 4, 4)
    ends = Ends([0.0, 0.5], values[0], values[1], values[2])
    picture = draw_ends(ends, names=names_of(None, 1), title="")
    corners = []
    for red in reds:
        y, x = np.nonzero((picture == (red, 200, 100)).all(-1))
        assert len(y) == 64 * 64
        corners.append((int(y.min()), int(x.min())))
    tops, lefts = sorted({y for y, _ in corners}), sorted({x for _, x in corners})
    assert corners == [(top, left) for top in tops for left in lefts], "a row a kind, a column a time"
    assert draw_ends(ends._replace(by_steps=None), names=[""], title="").shape[0] < picture.shape[0]


def test_pictures_of_a_network() -> None:
    data = Gaussian.example(*SHAPE)
    predictor, (_, y) = Predictor(data.net()), starts_of(INFO, labels=[3, 1])
    noise, one = gaussian_noise(data, 2), torch.tensor([3])
    drawn = {
        "trajectory": trajectory_picture(predictor, noise, y, ImageDecoder(INFO, "cpu"), steps=4),
        "reconstruction": reconstruction_picture(reconstruct(predictor, noise / 2, noise, y), y),
        "interpolation": interpolation_picture(
            {s: interpolate_samples(predictor, noise, one, steps=s) for s in (1, 4)}, one
        ),
    }
    for name, picture in drawn.items():
        height, width, channels = picture.shape
        assert (picture.dtype, channels) == (np.uint8, 3)
        assert 100 < height < 1000, name
        assert 300 < width < 1000, name
        assert picture.std() > 20, name


def test_starts() -> None:
    noise, y = starts_of(INFO, labels=[3, 1], seed=2)
    assert torch.equal(noise, noise_of(2, 2, SHAPE))
    assert y is not None
    assert y.tolist() == [3, 1]
    fresh = fresh_noise_of(0, [5, 2], noise)
    assert torch.equal(fresh(1), fresh_noise_of(0, [2, 5], noise)(1).flip(0))
    assert not torch.equal(fresh(1), fresh(2))
    for options, message in (
        ({"labels": [10]}, "labels must be from 0 to 9, got 10"),
        ({"labels": [1], "count": 2}, "labels or a count"),
        ({"count": 0}, "count must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            starts_of(INFO, **options)
    with pytest.raises(ValueError, match="trained without labels"):
        starts_of(DataInfo(SHAPE, None), labels=[1])
    with pytest.raises(ValueError, match=r"only pictures can be drawn.*\(16, 2\)"):
        starts_of(DataInfo((16, 2), None))
    with pytest.raises(ValueError, match="at least 1; got 0 pairs"):
        pairs_of(INFO, pairs=0)


def tiny(folder: Path, *overrides: str) -> RunConfig:
    small = ["backbone.options.width=16", "backbone.options.depth=1", "training.grid_steps=[1,2]", "evaluation=null"]
    return with_overrides(recipe(), [*small, f"data.folder={folder}", *overrides])


@pytest.mark.parametrize("objective", ["shortcut", "flow_matching", "consistency_training", "live_reflow"])
def test_training_pictures(objective: str, digits: DigitsData, tmp_path: Path) -> None:
    config = tiny(digits.folder, f"objective.kind={objective}")
    network = config.build_network().train()
    # At first a network says nothing at all.
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    made, again = (training_pictures(config, network, device) for _ in range(2))
    assert network.training
    assert torch.equal(made.ends.x_t, again.ends.x_t)
    assert torch.equal(made.between, again.between)
    assert (made.ends.by_flow is None) == (objective == "consistency_training")
    assert (made.ends.by_steps is None) == (objective == "flow_matching")
    pictures = save_pictures(config, made, tmp_path, 7, ImageDecoder(config.data.describe(), device))
    assert list(pictures) == ["samples", "reconstruction", "interpolation"]
    assert (tmp_path / "grids" / "step_00000007.png").is_file()
    for name, picture in pictures.items():
        assert picture.dtype == np.uint8, name
        assert picture.std() > 10, name
