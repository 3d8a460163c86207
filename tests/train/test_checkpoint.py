"""Checkpoints are whole or not there, and give back exactly what was put in."""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, SavePlan
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from shortcutflow import checkpoint
from shortcutflow.checkpoint import Checkpoint, latest_in
from shortcutflow.ema import PowerFunctionEMAConfig
from shortcutflow.optim import OptimizerConfig, build_optimizer
from shortcutflow.posthoc import find_snapshots, posthoc_ema
from shortcutflow.train import checkpoint_writer, state
from shortcutflow.train.checkpoint_writer import (
    SHARD_OFFSETS,
    CheckpointWriter,
    SavingError,
    tensors_of_rank,
    write_shards,
)
from tests.processes import run_forked
from tests.train.saving import POINTS, filled, kill_at_each_point, save_too_much


def save(folder: Path, step: int, **groups: dict[str, Tensor]) -> Checkpoint:
    """A whole checkpoint, when this returns."""
    with CheckpointWriter(folder) as writer:
        writer.save(step, groups or filled(step), {"images_seen": 10 * step})
    last = latest_in(folder)
    assert last is not None
    return last


def restore(saved: Checkpoint, groups: dict[str, dict[str, Tensor]]) -> None:
    """Tensors that belong to no optimizer."""
    net = nn.Linear(1, 1)
    saved.restore(groups, build_optimizer(net.parameters(), OptimizerConfig()), net)


def assert_is_filled(saved: Checkpoint | None, step: int) -> None:
    assert saved is not None
    assert saved.step == saved.state()["step"] == step
    for group, tensors in filled(step).items():
        loaded = saved.tensors(group)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.arange(4, dtype=torch.int64),
        "c.d": torch.tensor(2.5),
        "half": torch.randn(3).bfloat16(),
        "transposed": torch.randn(3, 2).T,
    }
    saved = save(tmp_path, 7, network=tensors)
    assert saved == Checkpoint(tmp_path / "step_00000007", 7)
    loaded = saved.tensors("network")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype
    assert saved.state() | {"step": 7, "images_seen": 70} == saved.state()


def test_tensors_may_change_as_soon_as_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been written by then, and what is written is the state of that moment."""
    write, changed = write_shards, []

    def late(*args, **kwargs):
        while not changed:
            pass
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint_writer, "write_shards", late)
    groups = filled(1)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, groups, {})
        assert latest_in(tmp_path) is None
        for tensors in groups.values():
            for tensor in tensors.values():
                tensor.zero_()
        changed.append(True)
    assert_is_filled(latest_in(tmp_path), 1)


def test_one_at_a_time(tmp_path: Path) -> None:
    """A save waits for the one before it, and the last is whole when the writer is left."""
    with CheckpointWriter(tmp_path, keep=10) as writer:
        for step in range(1, 6):
            writer.save(step, filled(step), {})
            assert len(checkpoint.all_in(tmp_path)) >= step - 1
    for saved in checkpoint.all_in(tmp_path):
        assert_is_filled(saved, saved.step)
    assert len(checkpoint.all_in(tmp_path)) == 5


def test_saving_over_the_same_step(tmp_path: Path) -> None:
    save(tmp_path, 1, network={"a": torch.zeros(2)})
    again = save(tmp_path, 1, network={"a": torch.ones(2)})
    assert torch.equal(again.tensors("network")["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, 0, [60]), (2, 0, [50, 60]), (9, 0, [10, 20, 30, 40, 50, 60]), (1, 20, [20, 40, 60]), (2, 30, [30, 50, 60])],
)
def test_what_is_kept(tmp_path: Path, keep: int, keep_every: int, left: list[int]) -> None:
    with CheckpointWriter(tmp_path, keep=keep, keep_every=keep_every) as writer:
        for step in range(10, 70, 10):
            writer.save(step, {"network": {"a": torch.zeros(1)}}, {})
    assert [saved.step for saved in checkpoint.all_in(tmp_path)] == left
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in left]


def test_killed_while_saving(tmp_path: Path) -> None:
    """SIGKILL at each point in turn: the newest checkpoint is whole, and the next save succeeds."""
    done = run_forked(kill_at_each_point, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = []
    for name in POINTS:
        newest = latest_in(tmp_path / name)
        assert newest is not None
        assert_is_filled(newest, newest.step)
        steps.append(newest.step)
        assert_is_filled(save(tmp_path / name, 3), 3)
        assert not list((tmp_path / name).glob(".*")), "what the kill left is gone"
    # Until the folder has its name the one before counts, from then on the new one.
    named = POINTS.index("named")
    assert steps == [1] * named + [2] * (len(POINTS) - named)


# ---- what cannot be written


def disk_full(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["write", "sync", "rename"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    assert_is_filled(save(tmp_path, 1), 1)
    with monkeypatch.context() as patched:
        match place:
            case "write":
                patched.setattr(checkpoint_writer, "write_shards", disk_full)
            case "sync":
                patched.setattr("shortcutflow.io.atomic.sync", disk_full)
            case _:
                patched.setattr(Path, "replace", disk_full)
        writer = CheckpointWriter(tmp_path)
        writer.save(2, filled(2), {})
        with pytest.raises(SavingError, match="No space left on device") as caught:
            writer.wait()
    assert f"the last whole checkpoint is {tmp_path / 'step_00000001'}" in str(caught.value)
    assert_is_filled(latest_in(tmp_path), 1)
    assert not list(tmp_path.glob(".*")), "half a checkpoint does not keep the disk full"
    assert_is_filled(save(tmp_path, 2), 2)


def test_failure_is_told_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "write_shards", disk_full)
    writer = CheckpointWriter(tmp_path)
    writer.save(1, filled(1), {})
    with pytest.raises(SavingError, match="there is no checkpoint before it"):
        writer.save(2, filled(2), {})


def test_failure_does_not_hide_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "write_shards", disk_full)

    def train() -> None:
        with CheckpointWriter(tmp_path) as writer:
            writer.save(1, filled(1), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_files_that_the_system_refuses(tmp_path: Path) -> None:
    """Not a made-up error: the operating system lets no file grow beyond 100 kB."""
    done = run_forked(save_too_much, tmp_path)
    assert f"the last whole checkpoint is {tmp_path / 'step_00000001'}" in done.stdout, done.stderr[-2000:]
    newest = latest_in(tmp_path)
    assert newest is not None
    assert torch.equal(newest.tensors("network")["a"], torch.ones(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


# ---- what cannot be read


def test_missing_group_lists_those_there(tmp_path: Path) -> None:
    saved = save(tmp_path, 1, network={"a": torch.zeros(1)}, optimizer={"b": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="holds no 'average_ema'; it holds: network, optimizer"):
        saved.tensors("average_ema")


def test_another_network_names_the_tensor(tmp_path: Path) -> None:
    saved = save(tmp_path, 1, network={"a": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="holds no 'network/b': it belongs to another network"):
        restore(saved, {"network": {"b": torch.zeros(3, 2)}})
    with pytest.raises(ValueError, match=r"'network/a' is \(3, 2\), here \(2, 3\)"):
        restore(saved, {"network": {"a": torch.zeros(2, 3)}})


@pytest.mark.parametrize("knows_sizes", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9], ids=["empty", "header", "most"])
def test_damaged_file(tmp_path: Path, keep: float, knows_sizes: bool) -> None:
    """Cut off; also where a checkpoint of an older version does not say how large its files are."""
    saved = save(tmp_path, 1)
    (file,) = saved.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    if not knows_sizes:
        state = {name: value for name, value in saved.state().items() if name != "files"}
        (saved.folder / checkpoint.STATE).write_text(json.dumps(state))
    for read in (lambda: saved.tensors("network"), lambda: restore(saved, filled(2))):
        with pytest.raises(ValueError, match="step_00000001"):
            read()


def test_lost_file(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    (file,) = saved.folder.glob("*.safetensors")
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} is missing"):
        saved.tensors("network")


def test_folder_without_its_state_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2).folder / checkpoint.STATE).unlink()
    (tmp_path / "step_3_of_my_own").mkdir()
    assert [saved.step for saved in checkpoint.all_in(tmp_path)] == [1]


def pickled(folder: Path) -> list[str]:
    """Files that are neither JSON nor safetensors all through."""
    found = []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            else:
                with safe_open(file, "pt") as tensors:
                    list(tensors.keys())
        except Exception:
            found.append(file.name)
    return found


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = save(tmp_path, 1).folder
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert pickled(folder) == []
    torch.save({"a": torch.zeros(1)}, folder / "pickled.safetensors")
    assert pickled(folder) == ["pickled.safetensors"], "this would have been seen"


# ---- the optimizer


def step_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_optimizer_state_round_trip(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    """Of any optimizer, in two groups, with a parameter that never had a gradient."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).requires_grad_(True) for _ in range(2)]
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizers = []
    for net in nets:
        net.unused = nn.Parameter(torch.ones(2))
        net.forward = lambda x, net=net: net[1](net[0](x))  # type: ignore[method-assign]
        groups = [{"params": net[1].parameters()}, {"params": [*net[0].parameters(), net.unused]}]
        optimizers.append(kind(groups, lr=0.1, **options))  # type: ignore[call-arg]
    (net, twin), (optimizer, twin_optimizer) = nets, optimizers
    step_of(net, optimizer)
    step_of(net, optimizer)
    saved = save(tmp_path, 2, network=net.state_dict(), optimizer=checkpoint.optimizer_tensors(optimizer, net))
    saved.restore({"network": twin.state_dict()}, twin_optimizer, twin)
    step_of(net, optimizer)
    step_of(twin, twin_optimizer)
    assert torch.equal(net[0].weight, twin[0].weight)

    fresh = kind(twin.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    twin.load_state_dict(saved.tensors("network"))
    step_of(twin, fresh)
    assert not torch.equal(net[0].weight, twin[0].weight), "without the optimizer's state it is another step"


def test_optimizer_before_its_first_step(tmp_path: Path) -> None:
    """All steps so far may have been skipped."""
    net = nn.Linear(3, 2)
    optimizer = build_optimizer(net.parameters(), OptimizerConfig())
    saved = save(tmp_path, 1, network=net.state_dict(), optimizer=checkpoint.optimizer_tensors(optimizer, net))
    saved.restore({"network": net.state_dict()}, optimizer, net)
    assert not optimizer.state, "and then it begins as a new one does"
    step_of(net, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1}


# ---- what PyTorch writes and warns of


def test_format_is_that_of_pytorch(tmp_path: Path) -> None:
    """Its reader finds the parts by an entry of the header that has no public name."""
    tensors = {"network/a": torch.randn(3, 2), "network/b": torch.tensor(1.0)}
    writer = HuggingFaceStorageWriter(str(tmp_path / "torch"), save_distributed=True)
    torch.distributed.checkpoint.save(tensors, storage_writer=writer, no_dist=True)
    folder = save(
        tmp_path / "here", 1, network={name.removeprefix("network/"): t for name, t in tensors.items()}
    ).folder
    places = []
    for file in (*(tmp_path / "torch").iterdir(), *folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places.append(json.loads(opened.metadata()[SHARD_OFFSETS]))
            assert {name: opened.get_tensor(name).tolist() for name in tensors} == {
                n: t.tolist() for n, t in tensors.items()
            }
    assert len(places) == 2
    assert places[0] == places[1]


def test_two_shards_of_one_tensor_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's header has room for the offset of one."""
    plan = DefaultSavePlanner.create_local_plan
    monkeypatch.setattr(DefaultSavePlanner, "create_local_plan", lambda self: SavePlan([*plan(self).items] * 2))
    with pytest.raises(ValueError, match="one rank holds two shards of 'a'"):
        write_shards({"a": torch.zeros(2)}, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_no_warning_and_no_filter_left(tmp_path: Path) -> None:
    """One process that saves and loads alone is meant; other code's warnings of the kind are not dropped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        saved = save(tmp_path, 1)
        saved.tensors("network")
        assert warnings.filters == before
    assert [str(each.message) for each in caught] == []


# ---- what each process copies


@pytest.mark.parametrize("size", [1, 2, 8])
def test_processes_share_what_all_of_them_hold(size: int) -> None:
    flat = {f"{n}": torch.zeros(1 + 50 * (n % 5), 10) for n in range(100)}
    shares = [tensors_of_rank(flat, rank, size) for rank in range(size)]
    assert sorted(name for each in shares for name in each) == sorted(flat), "each tensor in one process"
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in shares]
    assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in flat.values())
    assert all(list(each) == [name for name in flat if name in each] for each in shares)


class OnGPU(Tensor):
    """A tensor that says it is on a GPU, for a machine without one."""

    is_cuda = True  # type: ignore[assignment]


def test_a_gpu_is_waited_for_once_for_scalars_and_once_for_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW alone has a step count for each of hundreds of parameters, and each wait for one stops the GPU."""
    built: list[StagingOptions] = []
    staged: list[dict[str, Tensor]] = []
    waits: list[tuple[int, ...]] = []

    class Counting(DefaultStager):
        def __init__(self, options: StagingOptions) -> None:
            built.append(options)
            super().__init__(StagingOptions(False, False, False, False))

        def stage(self, state_dict: dict[str, Any], **more: Any) -> Any:
            staged.append(state_dict)
            return super().stage({name: plain(tensor) for name, tensor in state_dict.items()}, **more)

    def plain(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(Tensor)

    monkeypatch.setattr("torch.distributed.checkpoint.staging.DefaultStager", Counting)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (waits.append(tuple(tensor.shape)), plain(tensor))[1])
    weights = {f"{i}/exp_avg": torch.randn(3, 2).as_subclass(OnGPU) for i in range(50)}
    steps = {f"{i}/step": torch.tensor(float(i)).as_subclass(OnGPU) for i in range(50)}
    with CheckpointWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.save(step, {"optimizer": weights | steps}, {})
    assert [(each.use_pinned_memory, each.use_non_blocking_copy, each.use_async_staging) for each in built] == [
        (True, True, False)
    ], "one stager for the run, which pins its memory and waits once"
    assert waits == [(50, 1)] * 2
    for each in staged:
        assert {name for name, tensor in each.items() if tensor.is_cuda} == {f"optimizer/{name}" for name in weights}
    monkeypatch.undo()
    last = latest_in(tmp_path)
    assert last is not None
    saved = last.tensors("optimizer")
    assert all(torch.equal(saved[name], plain(tensor)) for name, tensor in (weights | steps).items())


def test_copies_can_be_moved(tmp_path: Path) -> None:
    """A checkpoint is a folder like any other: nothing in it names its place."""
    save(tmp_path / "here", 1)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert_is_filled(latest_in(tmp_path / "there"), 1)


def due_snapshot(net: nn.Module) -> tuple[Any, Any]:
    """A config and a state with one power-function EMA, of which a snapshot is due at step 4."""
    settings = PowerFunctionEMAConfig(sigma_rel=0.1, snapshot_every=2)
    config = SimpleNamespace(emas={"ema": settings}, training=SimpleNamespace(steps=10))
    return config, SimpleNamespace(emas={"ema": SimpleNamespace(network=net)})


@pytest.mark.parametrize("is_main", [True, False])
def test_a_snapshot_gathers_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_main: bool
) -> None:
    """On the GPUs; all of it is only in the host memory of the rank that writes."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []

    class Gathered:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)
            most.append(len(alive))

        def to(self, device: str, *, copy: bool) -> Tensor:
            return self.tensor.clone()

    monkeypatch.setattr(state, "full_tensor", Gathered)
    config, held = due_snapshot(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))))
    with CheckpointWriter(tmp_path) as writer:
        state.save_snapshots(config, held, writer, tmp_path, 4, is_main=is_main)
    assert len(most) == 10
    assert max(most) == 1
    assert [found.step for found in find_snapshots(tmp_path)] == ([4] if is_main else [])


def test_a_snapshot_is_written_beside_training_and_before_the_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run killed between the two, and resumed from the checkpoint, would never write it."""
    write, may_write = state.write_snapshot, threading.Event()

    def slow(*args: Any) -> object:
        assert may_write.wait(60)
        return write(*args)

    monkeypatch.setattr(state, "write_snapshot", slow)
    net = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    config, held = due_snapshot(net)
    with CheckpointWriter(tmp_path) as writer:
        state.save_snapshots(config, held, writer, tmp_path, 4, is_main=True)
        writer.save(4, filled(4), {})
        with torch.no_grad():
            net.weight.zero_()
        time.sleep(0.5)
        assert latest_in(tmp_path) is None
        may_write.set()
    assert_is_filled(latest_in(tmp_path), 4)
    (found,) = find_snapshots(tmp_path)
    kept = posthoc_ema([found], sigma_rel=0.1, step=4)
    assert all(torch.allclose(kept[name], before[name], atol=1e-3) for name in before)


def test_a_snapshot_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "write_snapshot", disk_full)
    config, held = due_snapshot(nn.Linear(2, 2))
    for saves in (True, False):
        writer = CheckpointWriter(tmp_path)
        state.save_snapshots(config, held, writer, tmp_path, 4, is_main=True)
        if saves:
            writer.save(4, filled(4), {})
        with pytest.raises(SavingError, match="No space left on device"):
            writer.wait()
        assert latest_in(tmp_path) is None
