"""adapt(): networks of others as shortcut models, equal to what they were before until training changes them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import backbones
import shortcutflow as sf
from backbones import Adapted, adapt

CLASSES = 5


class Small(nn.Module):
    """Takes (x, t); its time embedding has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + self.time(t[:, None])[:, :, None, None]
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.last(x)


class Labelled(Small):
    """Takes (x, t, y)."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(CLASSES + 1, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t) + self.label(y)[:, :, None, None]


class ViTDenoiser(nn.Module):
    """A vision transformer of timm from patches to patches."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision's image readers, which nothing here uses
            timm = pytest.importorskip("timm", reason="timm needs a torchvision that fits torch", exc_type=Exception)
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=2, depth=2, num_classes=0, global_pool="", class_token=False
        )
        self.to_patch = nn.Linear(self.vit.embed_dim, 3 * 2 * 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.to_patch(self.vit(x))
        return nn.functional.pixel_shuffle(tokens.mT.reshape(len(x), 12, 4, 4), 2)


class Foreign(NamedTuple):
    """A network, how it is called without adapt(), and what adapt() is told."""

    network: nn.Module
    original: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    options: dict[str, Any]
    labels: bool = False


def diffusers_unet() -> Foreign:
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, num_class_embeds=CLASSES + 1, attention_head_dim=8,
    )  # fmt: skip

    def call(net: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return net(x, 1000 * (1 - t), class_labels=y).sample

    return Foreign(unet, call, {"shape": (3, 8, 8), "at": "time_embedding", "call": call}, labels=True)


def sequential() -> Foreign:
    network = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2))
    options = {"shape": (2,), "embed": ("t", "d", "y"), "num_classes": CLASSES}
    return Foreign(network, lambda net, x, t, y: net(x), options, labels=True)


FOREIGN: dict[str, Callable[[], Foreign]] = {
    "(x, t)": lambda: Foreign(Small(), lambda net, x, t, y: net(x, t), {"shape": (3, 8, 8), "at": "time"}),
    "(x, t), at the input": lambda: Foreign(Small(), lambda net, x, t, y: net(x, t), {"shape": (3, 8, 8)}),
    "(x, t, y)": lambda: Foreign(
        Labelled(), lambda net, x, t, y: net(x, t, y), {"shape": (3, 8, 8), "at": "time"}, labels=True
    ),
    "diffusers": diffusers_unet,
    "timm": lambda: Foreign(
        ViTDenoiser(),
        lambda net, x, t, y: net(x),
        {"shape": (3, 8, 8), "at": "vit.patch_embed", "embed": ("t", "d"), "features": 192},
    ),
    "sequential": sequential,
}


def inputs(foreign: Foreign, batch: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(batch, *foreign.options["shape"], generator=generator)
    t, d = torch.rand(batch, generator=generator) / 2, 2.0 ** -torch.arange(1, batch + 1)
    return x_t, t, d, torch.arange(batch) % CLASSES if foreign.labels else None


@pytest.fixture(params=FOREIGN, ids=str)
def foreign(request: pytest.FixtureRequest) -> Foreign:
    torch.manual_seed(0)
    return FOREIGN[request.param]()


def test_outputs_are_identical_at_the_start_and_depend_on_d_after(foreign: Foreign) -> None:
    x_t, t, d, y = inputs(foreign)
    before = foreign.original(foreign.network, x_t, t, y)
    net = adapt(foreign.network, **foreign.options)
    assert torch.equal(net(x_t, t, d, y), before)
    assert torch.equal(net(x_t, t, d / 2, y), before)
    nn.init.normal_(net.out.weight)
    assert not torch.allclose(net(x_t, t, d, y), net(x_t, t, d / 2, y)), "the step size has a way in"
    assert not torch.allclose(net(x_t, t, d, y), net(x_t, t + 0.25, d, y))
    if foreign.labels:
        assert y is not None
        assert not torch.allclose(net(x_t, t, d, y), net(x_t, t, d, (y + 1) % CLASSES))


def test_it_trains_as_a_shortcut_model(foreign: Foreign) -> None:
    """One step with an average as the target: every new parameter moves, and the average's hook is its own."""
    x_t, _, d, y = inputs(foreign)
    net = adapt(foreign.network, **foreign.options)
    average = sf.EMA(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    objective = sf.ShortcutObjective(condition_dropout=0.0)
    for step in range(2):  # the embedding behind the zero weights learns from the second step on
        objective(net, x_t, y, target_net=average.network).loss.backward()
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()
    added = [(name, p) for name, p in net.named_parameters() if not name.startswith("network.")]
    assert added
    # Labels of the table that no sample has get a gradient of zero, as everywhere.
    assert all(p.grad is not None and p.grad.any() for _, p in added)
    assert torch.equal(average.network(x_t, d, d, y), copy.deepcopy(average.network)(x_t, d, d, y)), (
        "a copy calls its own parts"
    )
    assert not torch.allclose(average.network(x_t, d, d, y), net(x_t, d, d, y))
    assert sf.sample(net, x_t, y, steps=4).shape == x_t.shape


def test_names_of_the_networks_parameters_stay(foreign: Foreign) -> None:
    names, untouched = set(foreign.network.state_dict()), copy.deepcopy(foreign.network)
    net = adapt(foreign.network, **foreign.options)
    assert {name.removeprefix("network.") for name in net.state_dict() if name.startswith("network.")} == names
    net.load_state_dict(net.state_dict())
    untouched.load_state_dict(net.network.state_dict())


def test_what_every_backbone_has(foreign: Foreign) -> None:
    net, given = adapt(foreign.network, **foreign.options), inputs(foreign)
    assert isinstance(net, Adapted)
    units = net.shard_plan()
    assert units
    assert set(units) <= set(net.network.modules())
    y = given[3]
    assert net.flops(y=None if y is None else y[:1]) > 0
    nn.init.normal_(net.out.weight)
    eager = net(*given)
    net.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(net(*given), eager)
    torch._dynamo.reset()


def test_the_whole_compiles_without_a_break() -> None:
    net = adapt(Small(), shape=(3, 8, 8), at="time")
    nn.init.normal_(net.out.weight)
    given = inputs(Foreign(net, lambda *_: torch.empty(0), {"shape": (3, 8, 8)}))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), net(*given))


def test_time_and_step_size_stay_float32_under_autocast() -> None:
    net = adapt(Small(), shape=(3, 8, 8), at="time")
    seen: list[torch.dtype] = []
    net.out.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*inputs(Foreign(net, lambda *_: torch.empty(0), {"shape": (3, 8, 8)})))
    assert seen == [torch.float32]
    assert out.dtype == torch.bfloat16


# ---- errors


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (Small, {"at": "tine"}, r"no part 'tine'; it has, for example, 'time'"),
        (Small, {"embed": ("t",)}, r'embed must name "d" and may name "t" and "y", got \(\'t\',\)'),
        (Small, {"embed": ("d", "y")}, r'embed "y" and num_classes go together'),
        (Small, {"num_classes": 3}, r'embed "y" and num_classes go together'),
        (lambda: nn.Sequential(nn.Linear(8, 8)), {}, r'takes x alone: embed=\("t", "d"\) gives it the time'),
        (
            lambda: nn.Sequential(nn.SiLU()),
            {"at": "0", "embed": ("t", "d")},
            r"of part '0' cannot be found .* features=",
        ),
        (lambda: adapt(Small(), shape=(3, 8, 8), at="time").network, {"at": "blocks.0"}, "adapted before, at 'time'"),
        (lambda: adapt(Small(), shape=(3, 8, 8)), {"at": "network.time"}, r"adapted before: use what that adapt\(\)"),
        (lambda: torch.compile(Small()), {"at": "time"}, "compiled around part 'time'"),
        (lambda: torch.compile(Small()), {"at": "_orig_mod.time"}, "compiled around part '_orig_mod.time'"),
        (lambda: compiled_in_place(Small()), {"at": "time"}, r"adapt the network itself, then compile what adapt\(\)"),
    ],
    ids=[
        "no such part", "no d", "no classes", "no y", "x alone", "no channels",
        "twice", "adapted", "compiled", "inside the compiled", "compiled in place",
    ],
)  # fmt: skip
def test_what_cannot_be_adapted(network: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(network(), **({"shape": (3, 8, 8)} | options))


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile()
    return network


def test_a_compiled_network_or_part_takes_the_embedding_outside() -> None:
    """A part's hook is compiled with it, and x_t is outside of everything."""
    x_t, t, d, _ = inputs(Foreign(nn.Identity(), lambda *_: torch.empty(0), {"shape": (3, 8, 8)}))
    compiled_part = Small()
    compiled_part.time.compile(backend="eager")
    compiled_part(x_t, t)
    for network, at in ((compiled_part, "time"), (torch.compile(Small(), backend="eager"), None)):
        net = adapt(network, shape=(3, 8, 8), at=at)
        nn.init.normal_(net.out.weight)
        assert not torch.equal(net(x_t, t, d), net(x_t, t, 1 - d))


def test_calls_that_are_refused() -> None:
    x_t, t, d, _ = given = inputs(Foreign(nn.Identity(), lambda *_: torch.empty(0), {"shape": (3, 8, 8)}))
    net = adapt(Small(), shape=(3, 8, 8), at="time")
    with pytest.raises(ValueError, match="takes no condition: y must be None"):
        net(x_t, t, d, torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"x_t must have shape \(batch, 3, 8, 8\)"):
        net(x_t[:, :2], t, d)
    with pytest.raises(RuntimeError, match="ran outside of it"):
        net.network(x_t, t)
    unused = adapt(Small(), shape=(3, 8, 8), at="time", call=lambda net, x, t, y: x)
    with pytest.raises(ValueError, match="did not call its part 'time'"):
        unused(*given)
    mistaken = adapt(Small(), shape=(3, 8, 8), at="time", features=8)
    with pytest.raises(ValueError, match=r"part 'time' gives \(4, 16\), without an axis of 8 channels"):
        mistaken(*given)
    wrong = adapt(Small(), shape=(3, 8, 8), call=lambda net, x, t, y: net(x, t)[:, :1])
    with pytest.raises(ValueError, match=r"must return the shape of x_t, \(4, 3, 8, 8\), not \(4, 1, 8, 8\)"):
        wrong(*given)


def test_adapting_one_of_ours_is_not_needed_but_works() -> None:
    net = adapt(backbones.create("dit", shape=(3, 8, 8), width=32, depth=1, heads=2), shape=(3, 8, 8),
                call=lambda net, x, t, y: net(x, t, torch.zeros_like(t), y))  # fmt: skip
    x_t, t, d, y = inputs(Foreign(net, lambda *_: torch.empty(0), {"shape": (3, 8, 8)}))
    assert net(x_t, t, d, y).shape == x_t.shape


def test_a_video_gets_the_embedding_on_its_channels() -> None:
    """Also where its width equals the number of channels."""
    for at in (None, "0"):
        net = adapt(nn.Sequential(nn.Conv3d(4, 4, 1)), shape=(4, 2, 3, 4), at=at, call=lambda n, x, t, y: n(x))
        x, t = torch.zeros(2, 4, 2, 3, 4), torch.full((2,), 0.5)
        before = net(x, t, t)
        nn.init.normal_(net.out.weight)
        added = net(x, t, t) - before
        assert added.flatten(2).std(2).max() < 1e-6, "the same at every place of a channel"
        assert added.mean((2, 3, 4)).std(1).min() > 1e-3, "another for each channel"
