"""The selective scan against its definition, and Mamba's mixer: order, precision, compilation, names, kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import mamba_mixer, selective_scan
from backbones.mamba_mixer import MambaMixer
from backbones.selective_scan import STEPS, selective_scan_recurrence

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
Scan = Callable[..., Tensor]


def inputs(n: int, batch: int = 2, width: int = 6, state: int = 4, size: float = 1.0) -> dict[str, Tensor]:
    """Arguments of a scan in float64; delta is below zero in part, so only fit for a softplus."""
    draws = torch.Generator().manual_seed(n)
    shapes = {name: (batch, width, n) for name in ("u", "delta", "z")} | {name: (batch, state, n) for name in "BC"}
    shapes |= {"A": (width, state), "D": (width,), "delta_bias": (width,)}
    given = {name: torch.randn(shapes[name], generator=draws, dtype=torch.float64) for name in NAMES}
    return given | {"A": -given["A"].exp(), "delta": given["delta"] * size}


def errors(scan: Scan, given: dict[str, Tensor], dtype: torch.dtype, softplus: bool = True) -> dict[str, float]:
    """Largest error of the output and of each gradient, over the largest value, against the recurrence in float64."""
    values = []
    for function, kind in ((selective_scan_recurrence, torch.float64), (scan, dtype)):
        leaves = {name: x.detach().to(kind).requires_grad_() for name, x in given.items()}
        y = function(**leaves, delta_softplus=softplus)
        assert y.dtype == kind
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)
        grads = torch.autograd.grad(y, list(leaves.values()), weights.to(kind))
        values.append([x.detach().double() for x in (y, *grads)])
    return {
        name: float((ours - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
        for name, exact, ours in zip(("y", *leaves), *values, strict=True)
    }


LENGTHS = [1, 2, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS, 5 * STEPS + 3]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_scan_is_the_recurrence(n: int, dtype: torch.dtype, tolerance: float) -> None:
    found = errors(selective_scan.selective_scan, inputs(n), dtype)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize(("n", "batch"), [(6 * STEPS, 1), (5 * STEPS + 5, 5)])
@pytest.mark.parametrize("chunks", [0, 4, 7])
def test_any_cut_into_groups_and_blocks_of_samples(
    monkeypatch: pytest.MonkeyPatch, n: int, batch: int, chunks: int
) -> None:
    monkeypatch.setattr(selective_scan, "_CPU_BUFFER", chunks * STEPS * 6 * 4)
    found = errors(selective_scan.selective_scan, inputs(n, batch), torch.float64)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize(
    "left_out", list(itertools.product([(), ("D",)], [(), ("z",)], [(), ("delta_bias",)])), ids=str
)
@pytest.mark.parametrize("softplus", [True, False])
def test_scan_without_parts(left_out: tuple[tuple[str, ...], ...], softplus: bool) -> None:
    given = inputs(21)
    if not softplus:
        given |= {"delta": given["delta"].abs(), "delta_bias": given["delta_bias"].abs()}
    given = {name: x for name, x in given.items() if name not in sum(left_out, ())}
    found = errors(selective_scan.selective_scan, given, torch.float32, softplus)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_steps_do_not_overflow(size: float) -> None:
    """With these, products of decays over a chunk lie far below what float32 can hold, and their inverses above."""
    found = errors(selective_scan.selective_scan, inputs(3 * STEPS + 1, size=size), torch.float32)
    assert max(found.values()) < 1e-5, found


def test_long_sequences_are_finite_and_near() -> None:
    found = errors(selective_scan.selective_scan, inputs(4096, batch=1, width=2, state=2), torch.float32)
    assert max(found.values()) < 1e-4, found


def test_the_check_finds_wrong_scans() -> None:
    """A wrong sign, a state one token late, and chunks that hand nothing on fail what the scan passes."""
    scan, given = selective_scan.selective_scan, inputs(3 * STEPS)

    def sign(A: Tensor, B: Tensor, **rest: Any) -> Tensor:
        return scan(A=A, B=-B, **rest)

    def late(C: Tensor, **rest: Any) -> Tensor:
        return scan(C=C.roll(1, -1), **rest)

    def forgetful(A: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool, **rest: Tensor) -> Tensor:
        pieces = [dict(zip(rest, cut, strict=True)) for cut in zip(*(x.split(STEPS, -1) for x in rest.values()))]  # noqa: B905
        return torch.cat(
            [scan(A=A, D=D, delta_bias=delta_bias, delta_softplus=delta_softplus, **piece) for piece in pieces], -1
        )

    for wrong in (sign, late, forgetful):
        assert max(errors(wrong, given, torch.float64).values()) > 1e-2, wrong


def test_gradients_are_those_of_finite_differences() -> None:
    given = [x.requires_grad_() for x in inputs(STEPS + 3, batch=1, width=2, state=2).values()]
    assert torch.autograd.gradcheck(functools.partial(selective_scan.selective_scan, delta_softplus=True), given)


def test_forward_mode_takes_the_recurrence_and_second_derivatives_raise() -> None:
    given = inputs(4)
    rest = {name: x for name, x in given.items() if name != "u"}

    def tangent(scan: Scan, u: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: scan(x, **rest, delta_softplus=True), (u,), (given["z"],))[1]

    expected = tangent(selective_scan_recurrence, given["u"])
    assert expected.abs().max() > 1e-2
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    for function in (tangent, compiled):
        torch.testing.assert_close(function(selective_scan.selective_scan, given["u"]), expected)
    u = given["u"].requires_grad_()
    y = selective_scan.selective_scan(u, **rest, delta_softplus=True)
    (grad,) = torch.autograd.grad(y.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "z"])
def test_shapes_that_do_not_fit(name: str) -> None:
    given = inputs(5)
    with pytest.raises(ValueError, match=rf"^{name} must have shape"):
        selective_scan.selective_scan(**(given | {name: given[name][:1]}))


def test_flops() -> None:
    u, delta, A, B, C, *_ = (x.requires_grad_() for x in inputs(40).values())
    with FlopCounterMode(display=False) as counter:
        y = selective_scan.selective_scan(u, delta.exp(), A, B, C)
    assert counter.get_total_flops() == 9 * 2 * 40 * 6 * 4
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 18 * 2 * 40 * 6 * 4


# ---- the mixer


def mixer(width: int = 32, **options: Any) -> MambaMixer:
    torch.manual_seed(0)
    return MambaMixer(width, **options)


def tokens(n: int = 37, width: int = 32) -> Tensor:
    return torch.randn(2, n, width, generator=torch.Generator().manual_seed(1))


SHAPES = {
    "A_log": (64, 16), "D": (64,), "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,),
    "x_proj.weight": (34, 64), "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "out_proj.weight": (32, 64),
}  # fmt: skip
"""Of mamba_ssm.modules.mamba_simple.Mamba(32)."""


def test_state_dict_is_that_of_mamba_ssm() -> None:
    assert {name: tuple(x.shape) for name, x in mixer().state_dict().items()} == SHAPES
    both = mixer(bidirectional=True).state_dict()
    assert {name: tuple(both[name].shape) for name in SHAPES} == SHAPES
    inner = {name: shape for name, shape in SHAPES.items() if name not in ("in_proj.weight", "out_proj.weight")}
    extra = {name.removeprefix("reversed."): tuple(x.shape) for name, x in both.items() if name not in SHAPES}
    assert extra == inner
    assert mixer(dt_rank=5, state=3, conv=2, expand=1).x_proj.weight.shape == (5 + 3 + 3, 32)


def written_out(net: MambaMixer, x: Tensor) -> Tensor:
    """The mixer in the words of the paper, with nn.Conv1d and the recurrence."""
    n = x.shape[1]
    inside, z = net.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    inside = nn.functional.silu(net.conv1d(inside)[..., :n])
    rank, state = net.dt_proj.in_features, net.A_log.shape[1]
    step, B, C = net.x_proj(inside.transpose(1, 2)).transpose(1, 2).split([rank, state, state], dim=1)
    delta = nn.functional.softplus(net.dt_proj(step.transpose(1, 2))).transpose(1, 2)
    y = selective_scan_recurrence(inside, delta, -net.A_log.exp(), B, C, net.D)
    return net.out_proj((y * nn.functional.silu(z)).transpose(1, 2))


def test_mixer_is_its_definition() -> None:
    net, x = mixer(), tokens()
    torch.testing.assert_close(net(x), written_out(net, x), rtol=1e-4, atol=1e-6)
    both = mixer(bidirectional=True)
    first, second = mixer(), mixer()
    first.load_state_dict({name: both.state_dict()[name] for name in SHAPES})
    second.load_state_dict(
        {name: both.state_dict().get(f"reversed.{name}", first.state_dict()[name]) for name in SHAPES}
    )
    expected = written_out(first, x) + written_out(second, x.flip(1)).flip(1)
    torch.testing.assert_close(both(x), expected, rtol=1e-4, atol=1e-6)


def test_start() -> None:
    net = mixer(64)
    assert net.A_log.dtype == torch.float32
    torch.testing.assert_close(net.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert net.D.eq(1).all()
    steps = nn.functional.softplus(net.dt_proj.bias)
    assert 0.00099 < steps.min() < 0.002
    assert 0.05 < steps.max() < 0.101
    assert net.dt_proj.weight.abs().max() <= 4**-0.5


def test_reset_fills_every_parameter_after_the_meta_device() -> None:
    with torch.device("meta"):
        net = MambaMixer(32, bidirectional=True)
        assert net(torch.empty(2, 5, 32)).shape == (2, 5, 32)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(0)
    net.reset_parameters()
    assert all(p.isfinite().all() for p in net.parameters())
    torch.manual_seed(0)
    again = MambaMixer(32, bidirectional=True)
    again.reset_parameters()
    kept = {name: p.clone() for name, p in again.named_parameters()}
    torch.manual_seed(0)
    again.reset_parameters()
    assert all(torch.equal(p, net.get_parameter(name)) for name, p in again.named_parameters())
    assert not torch.equal(kept["in_proj.weight"], again.in_proj.weight)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_direction_sees_only_tokens_before(bidirectional: bool) -> None:
    net, x = mixer(bidirectional=bidirectional), tokens()
    other = x.clone()
    other[:, 20] += 1
    changed = (net(x) - net(other)).abs().amax((0, 2)) > 0
    assert changed[20:24].all()
    assert changed[36]
    assert bool(changed[:20].any()) == bidirectional
    assert bool(changed[0]) == bidirectional


def grads(net: nn.Module, x: Tensor) -> list[Tensor]:
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(net.parameters()))]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_bfloat16_autocast_is_near_and_repeats(bidirectional: bool) -> None:
    net, x = mixer(bidirectional=bidirectional), tokens()
    exact = grads(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, again = grads(net, x), grads(net, x)
    assert rounded[0].dtype == torch.bfloat16
    assert all(map(torch.equal, rounded, again))
    for a, b in zip(exact, rounded, strict=True):
        assert b.isfinite().all()
        assert (a - b).norm() < 0.05 * a.norm()


def test_autocast_leaves_the_scan_in_float32() -> None:
    given = {name: x.float() for name, x in inputs(40).items()}
    exact = selective_scan.selective_scan(**given, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan.selective_scan(**given, delta_softplus=True), exact)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_compiled_is_eager(bidirectional: bool) -> None:
    net, x = mixer(bidirectional=bidirectional), tokens(STEPS + 5)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads(net, x), grads(compiled, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- mamba-ssm's kernels


def test_kernels_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kernels must be one of auto, mamba-ssm, torch, got 'triton'"):
        MambaMixer(8, kernels="triton")
    monkeypatch.setattr(mamba_mixer, "fused_kernels", lambda: None)
    with pytest.raises(ImportError, match=r"pip install 'shortcutflow\[mamba\]' --no-build-isolation"):
        MambaMixer(8, kernels="mamba-ssm")
    monkeypatch.setattr(mamba_mixer, "fused_kernels", lambda: (selective_scan_recurrence, None))
    with pytest.raises(ValueError, match="on a GPU only, x is on cpu"):
        MambaMixer(8, kernels="mamba-ssm")(tokens(5, 8))
    x = tokens()
    for kernels in ("auto", "torch"):
        assert torch.equal(mixer(kernels=kernels)(x), mixer()(x))


def test_kernels_get_what_they_take() -> None:
    """Stand-ins for both kernels that insist on their dtypes and layouts; only mamba-ssm itself can show the rest."""

    def scan(*given: Tensor, z: Tensor, delta_bias: Tensor, delta_softplus: bool) -> Tensor:
        u, delta, A, B, C, D = given
        assert {x.dtype for x in (delta, B, C, z)} == {u.dtype}
        assert {x.dtype for x in (A, D, delta_bias)} == {torch.float32}
        return selective_scan_recurrence(*given, z, delta_bias, delta_softplus)

    def convolution(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        assert weight.shape == (64, 4)
        assert activation == "silu"
        y = nn.functional.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=64)
        return nn.functional.silu(y[..., : x.shape[-1]])

    net = mixer()
    inside, z = net.in_proj(tokens()).chunk(2, dim=-1)
    for fused in ((scan, None), (scan, convolution)):
        torch.testing.assert_close(net.mix(inside, z, fused), net.mix(inside, z, None), rtol=1e-4, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net.mix(inside.bfloat16(), z.bfloat16(), fused).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mamba-ssm's kernels run on a GPU only")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_scan_is_that_of_mamba_ssm(bidirectional: bool) -> None:
    pytest.importorskip("mamba_ssm.ops.selective_scan_interface")
    x = tokens(131, 64).cuda()
    fused, ours = (mixer(64, bidirectional=bidirectional, kernels=k).cuda() for k in ("mamba-ssm", "torch"))
    for a, b in zip(grads(fused, x), grads(ours, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    theirs = pytest.importorskip("mamba_ssm.modules.mamba_simple").Mamba(64).cuda()
    one = MambaMixer(64, kernels="torch").cuda()
    one.load_state_dict(theirs.state_dict())
    for (name, p), g in zip(theirs.named_parameters(), grads(theirs, x)[1:], strict=True):
        expected = dict(zip((k for k, _ in one.named_parameters()), grads(one, x)[1:], strict=True))[name]
        torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-4, msg=f"{name} {tuple(p.shape)}")
