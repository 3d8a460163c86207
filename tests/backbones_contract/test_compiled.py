"""torch.compile: of the units and of the whole network, without a break in the graph, for equal results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from shortcutflow.network import predict_data
from shortcutflow.train.parallel import compile_options
from tests.backbones_contract.cases import FIRST, IMAGE, OWN, TINY, Case, one_of_each_family, params
from tests.backbones_contract.compared import assert_equal_training, trained


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_units(case: Case, checkpoints: bool, tolerance: float = 1e-4, **options: object) -> None:
    net = case.awake().train()
    net.gradient_checkpointing = checkpoints
    names, expected = list(net.state_dict()), trained(net, case)
    assert counters["stats"]["unique_graphs"] == 0
    net.compile_blocks(**options)
    assert_equal_training(trained(net, case), expected, case, tolerance)
    assert 1 <= counters["stats"]["unique_graphs"] <= len(net.shard_plan())
    assert list(net.state_dict()) == names


def compiled_whole(case: Case, tolerance: float = 1e-4, *, data: bool = False, **options: object) -> None:
    net = case.awake().train()
    if data:
        before = trained(net, case)[0]
        predict_data(net)
        assert not torch.allclose(trained(net, case)[0], before)
    compiled = torch.compile(net, fullgraph=True, **options)
    assert_equal_training(trained(net, case, compiled), trained(net, case), case, tolerance)
    assert counters["stats"]["unique_graphs"] == 1 + data, "a hook is one of its own"


@one_of_each_family
def test_compiled_units_give_the_same(case: Case) -> None:
    compiled_units(case, checkpoints=False, backend="aot_eager")


@one_of_each_family
def test_compiled_as_a_whole_gives_the_same(case: Case) -> None:
    compiled_whole(case, backend="aot_eager")


@params(case for case in FIRST if case.family == "dit")
def test_compiled_prediction_of_data_gives_the_same(case: Case) -> None:
    compiled_whole(case, data=True, backend="aot_eager")


@params(case for case in FIRST if case.family in ("dit", "lstm"))
def test_compiled_units_can_be_checkpointed(case: Case) -> None:
    compiled_units(case, checkpoints=True, backend="aot_eager")


@pytest.mark.slow
@params(case for case in OWN if case not in FIRST)
def test_compiled_variants_give_the_same(case: Case) -> None:
    compiled_units(case, checkpoints=True, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    compiled_whole(case, backend="aot_eager")


@pytest.mark.slow
@one_of_each_family
def test_compiled_by_inductor_gives_the_same(case: Case) -> None:
    compiled_whole(case, tolerance=1e-3, **compile_options(torch.device("cpu")))


@pytest.mark.slow
@params(case for case in FIRST if case.family in ("dit", "lstm"))
def test_units_compiled_by_inductor_give_the_same(case: Case) -> None:
    compiled_units(case, checkpoints=False, tolerance=1e-3, **compile_options(torch.device("cpu")))


def test_a_break_in_the_graph_is_an_error() -> None:
    case = Case("dit", IMAGE, TINY["dit"].options)
    net = case.awake()
    net.blocks[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    net(*case.inputs())
    whole = torch.compile(net, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(*case.inputs())
    net.compile_blocks(backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        net(*case.inputs())


def test_the_limit_of_recompilations_is_only_raised() -> None:
    """By its public name, which is the one the compiler reads."""
    for before, after in ((1, 8), (1000, 1000)):
        with torch.compiler.config.patch(recompile_limit=before):
            Case("dit", IMAGE, TINY["dit"].options).build().compile_blocks()
            assert torch.compiler.config.recompile_limit == torch._dynamo.config.recompile_limit == after
