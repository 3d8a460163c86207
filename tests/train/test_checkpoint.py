"""Checkpoints are whole or not there, and give back exactly what was put in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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

from shortcutflow.ema import PowerFunctionEMAConfig
from shortcutflow.posthoc import find_snapshots
from shortcutflow.train import checkpoint, parts
from shortcutflow.train.checkpoint import Checkpoint, Saver, SavingError, latest_in
from shortcutflow.train.optim import OptimizerConfig, build_optimizer
from shortcutflow.train.shard_writer import PLACES, ShardWriter
from shortcutflow.train.staging import share
from tests.train import launched
from tests.train.saving import POINTS, filled


def save(folder: Path, step: int, **groups: dict[str, Tensor]) -> Checkpoint:
    """A whole checkpoint, when this returns."""
    with Saver(folder) as saver:
        saver.save(step, groups or filled(step), {"images_seen": 10 * step})
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
    write, changed = ShardWriter.write_data, []

    def late(*args, **kwargs):
        while not changed:
            pass
        return write(*args, **kwargs)

    monkeypatch.setattr(ShardWriter, "write_data", late)
    groups = filled(1)
    with Saver(tmp_path) as saver:
        saver.save(1, groups, {})
        assert latest_in(tmp_path) is None
        for tensors in groups.values():
            for tensor in tensors.values():
                tensor.zero_()
        changed.append(True)
    assert_is_filled(latest_in(tmp_path), 1)


def test_one_at_a_time(tmp_path: Path) -> None:
    """A save waits for the one before it, and the last is whole when the saver is left."""
    with Saver(tmp_path, keep=10) as saver:
        for step in range(1, 6):
            saver.save(step, filled(step), {})
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
    with Saver(tmp_path, keep=keep, keep_every=keep_every) as saver:
        for step in range(10, 70, 10):
            saver.save(step, {"network": {"a": torch.zeros(1)}}, {})
    assert [saved.step for saved in checkpoint.all_in(tmp_path)] == left
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in left]


def test_killed_while_saving(tmp_path: Path) -> None:
    """SIGKILL at each point in turn: the newest checkpoint is whole, and the next save succeeds."""
    done = launched.run([sys.executable, "-m", "tests.train.saving", str(tmp_path)])
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
                patched.setattr(ShardWriter, "write_data", disk_full)
            case "sync":
                patched.setattr("shortcutflow.io.atomic.sync", disk_full)
            case _:
                patched.setattr(Path, "replace", disk_full)
        saver = Saver(tmp_path)
        saver.save(2, filled(2), {})
        with pytest.raises(SavingError, match="No space left on device") as caught:
            saver.wait()
    assert f"the last whole checkpoint is {tmp_path / 'step_00000001'}" in str(caught.value)
    assert_is_filled(latest_in(tmp_path), 1)
    assert not list(tmp_path.glob(".*")), "half a checkpoint does not keep the disk full"
    assert_is_filled(save(tmp_path, 2), 2)


def test_failure_is_told_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardWriter, "write_data", disk_full)
    saver = Saver(tmp_path)
    saver.save(1, filled(1), {})
    with pytest.raises(SavingError, match="there is no checkpoint before it"):
        saver.save(2, filled(2), {})


def test_failure_does_not_hide_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardWriter, "write_data", disk_full)

    def train() -> None:
        with Saver(tmp_path) as saver:
            saver.save(1, filled(1), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from shortcutflow.train.checkpoint import Saver, SavingError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Saver(Path(sys.argv[1])) as saver:
    saver.save(1, {"network": {"a": torch.ones(1000)}}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
saver.save(2, {"network": {"a": torch.ones(1_000_000)}}, {})
try:
    saver.wait()
except SavingError as error:
    print(error)
"""


def test_files_that_the_system_refuses(tmp_path: Path) -> None:
    """Not a made-up error: the operating system lets no file grow beyond 100 kB."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        cwd=launched.ROOT, env=launched.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
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
            places.append(json.loads(opened.metadata()[PLACES]))
            assert {name: opened.get_tensor(name).tolist() for name in tensors} == {
                n: t.tolist() for n, t in tensors.items()
            }
    assert len(places) == 2
    assert places[0] == places[1]


def test_two_parts_of_one_tensor_are_refused(tmp_path: Path) -> None:
    """A file's header has room for the place of one."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({"a": torch.zeros(2)}, is_coordinator=True)
    items = planner.create_local_plan().items
    (plan,) = ShardWriter(tmp_path).prepare_global_plan([SavePlan([*items, *items])])
    with pytest.raises(ValueError, match="one process holds two parts of 'a'"):
        ShardWriter(tmp_path).write_data(plan, planner)
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
    shares = [share(flat, rank, size) for rank in range(size)]
    assert sorted(name for each in shares for name in each) == sorted(flat), "each tensor in one process"
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in shares]
    assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in flat.values())
    assert all(list(each) == [name for name in flat if name in each] for each in shares)


def test_copies_can_be_moved(tmp_path: Path) -> None:
    """A checkpoint is a folder like any other: nothing in it names its place."""
    save(tmp_path / "here", 1)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert_is_filled(latest_in(tmp_path / "there"), 1)


@pytest.mark.parametrize("first", [True, False])
def test_a_snapshot_puts_one_tensor_together_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """On the GPUs; the whole of it is only in the host's memory, of the process that writes."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = []

    class Gathered:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)  # type: ignore[arg-type]
            most.append(len(alive))

        def cpu(self) -> Tensor:
            return self.tensor

    monkeypatch.setattr(parts, "whole", Gathered)
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    settings = PowerFunctionEMAConfig(sigma_rel=0.1, snapshot_every=2)
    config: Any = SimpleNamespace(emas={"ema": settings}, training=SimpleNamespace(steps=10))
    held: Any = SimpleNamespace(emas={"ema": SimpleNamespace(network=net)})
    parts.save_snapshots(config, held, tmp_path, 4, first=first)
    assert len(most) == 10
    assert max(most) == 1
    assert [found.step for found in find_snapshots(tmp_path)] == ([4] if first else [])
