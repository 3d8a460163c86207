"""Files that no well-meaning writer made, over 500, each to be refused. Run as a program it converts them all."""

from __future__ import annotations

import builtins
import copy
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.released_files import EmptyState, checkpoint, dumped, parameters

SIZES = {"width": 16, "depth": 1, "patch": 2, "channels": 3, "num_classes": 4}


class Calls:
    """Pickled as a call; the path is the canary that must not appear."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def named(module: str, name: str) -> Callable[..., Any]:
    """A name to be called, whether it exists here or not."""
    return type(name, (), {"__module__": module})  # type: ignore[return-value]


def cases(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each."""
    rng = np.random.default_rng(0)
    whole = checkpoint(parameters(rng, **SIZES), parameters(rng, **SIZES))
    good = dumped(whole)
    yield from truncated(good)
    yield from code(whole, canary)
    yield from by_hand(canary)
    yield from headers(good)
    yield from wrong_trees(whole, rng)


def truncated(good: bytes) -> Iterator[tuple[str, bytes]]:
    for percent in range(100):
        yield f"cut at {percent} %", good[: len(good) * percent // 100]
    yield "cut before its last byte", good[:-1]
    yield "with something behind", good + b"\0"
    yield "twice", good + good


def code(whole: dict[str, Any], canary: Path) -> Iterator[tuple[str, bytes]]:
    touch = f"touch {canary}"
    statement = f"open({str(canary)!r}, 'w').close()"
    calls = [
        (named("os", "system"), touch), (named("posix", "system"), touch), (named("nt", "system"), touch),
        (named("subprocess", "check_output"), ["touch", str(canary)]), (builtins.eval, statement),
        (builtins.exec, statement), (builtins.open, str(canary), "w"), (builtins.getattr, "a", "upper"),
        (named("builtins", "__import__"), "os"), (named("importlib", "import_module"), "os"),
        (named("numpy", "load"), str(canary)), (named("numpy", "save"), str(canary), 1),
        (named("numpy.core.multiarray", "fromfile"), str(canary)), (named("numpy.core.multiarray", "scalar"), 1),
        (named("numpy", "ndarray.tofile"), str(canary)), (named("optax._src.base", "EmptyState.__init__"), 1),
        (named("optax._src.transform", "scale_by_adam"), 1), (named("flax.core.frozen_dict", "freeze"), {}),
        (named("_codecs", "encode"), "a", "latin1"), (named("copyreg", "_reconstructor"), object, object, None),
        (named("torch", "load"), str(canary)), (named("pickle", "loads"), b"cos\nsystem\n(S'x'\ntR."),
    ]  # fmt: skip
    for function, *args in calls:
        harm = Calls(function, *args)
        name = f"{function.__module__}.{function.__name__}"
        for place in ("alone", "top", "params", "array", "optimizer", "argument", "step"):
            tree = copy.deepcopy(whole)
            state = tree["train_state"]
            match place:
                case "top":
                    tree["extra"] = harm
                case "params":
                    state["params"]["Embed_0"] = harm
                case "array":
                    state["params"]["Embed_0"]["embedding"] = harm
                case "optimizer":
                    state["opt_state"] = (EmptyState(), harm)
                case "argument":
                    state["params"] = Calls(named("flax.core.frozen_dict", "FrozenDict"), harm)
                case "step":
                    state["step"] = Calls(named("numpy.core.multiarray", "_reconstruct"), harm, (0,), b"b")
            yield f"{name} in {place}", dumped(harm if place == "alone" else tree)


def by_hand(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Operations that Python's pickler would not write."""
    p4 = b"\x80\x04"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tC\x01b\x87R"
    yield "empty", b""
    yield "text", b"this is no pickle"
    yield "zip", b"PK\x03\x04" + bytes(100)
    yield "protocol 0", b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    yield "protocol 2", b"\x80\x02cos\nsystem\nU\x01x\x85R."
    yield "protocol 255", b"\x80\xff."
    yield "INST", p4 + b"(S'touch " + str(canary).encode() + b"'\nios\nsystem\n."
    yield "OBJ", p4 + b"(cos\nsystem\nU\x01xo."
    yield "NEWOBJ_EX", p4 + b"cos\nsystem\n)}\x92."
    yield "EXT1", p4 + b"\x82\x01."
    yield "PERSID", p4 + b"Pos\n."
    yield "BINPERSID", p4 + b"K\x01Q."
    yield "a global and nothing else", p4 + b"cnumpy\nndarray\n."
    yield "marks 100,000 deep", p4 + b"(" * 100_000 + b"."
    yield "marks a million deep", p4 + b"(" * 1_000_000 + b"."
    yield "tuples 100,000 deep", p4 + b")" + b"\x85" * 100_000 + b"."
    yield "dictionaries 50,000 deep", p4 + b"}\x8c\x01a" * 50_000 + b"}" + b"s" * 50_000 + b"."
    yield "a dictionary in itself", p4 + b"}\x94\x8c\x01ah\x00s."
    tenfold = b"".join(b"(" + (b"h" + bytes([i])) * 10 + b"t\x94" for i in range(12))
    yield "ten to the power of twelve", p4 + b"()\x94" + tenfold + b"t."
    yield "a name of 4 GB", p4 + b"X\xff\xff\xff\xffa."
    yield "a name of 200,000 bytes", p4 + b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"."
    yield "a global of 200,000 bytes", p4 + b"c" + b"a" * 200_000 + b"\nb\n."
    yield "a whole number of 255 bytes", p4 + b"\x8a\xff" + b"\x7f" * 255 + b"."
    yield "a long whole number", p4 + b"\x8b" + struct.pack("<i", 2**30) + b"\x7f."
    yield "not UTF-8", p4 + b"\x8c\x02\xff\xfe."
    yield "recalls nothing", p4 + b"h\x07."
    yield "takes from nothing", p4 + b"R."
    yield "builds nothing", p4 + b"}}b."
    yield "half-built array", p4 + array + b"."
    yield "calls a dictionary", p4 + b"})R."
    yield "array as a key", p4 + b"}" + array + b"K\x01s."
    yield "bytes as a key", p4 + b"}C\x01aK\x01s."
    yield "fills a tuple", p4 + b")\x8c\x01aK\x01s."
    yield "an object array", p4 + b"cnumpy\ndtype\n\x8c\x02O8\x89\x88\x87R."
    yield "memo numbers of 4 GB", p4 + b"}r\xff\xff\xff\xffj\xfe\xff\xff\xff."
    yield "a number", p4 + b"K\x01."
    yield "None", p4 + b"N."


def headers(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Arrays and lengths that promise far more than the file has."""
    for size in (2**31 - 1, 100 * 2**30, 2**62):
        for length in (0, 4, 100 * 2**30, 2**63, 2**64 - 1):
            shape = b"\x8a\x08" + struct.pack("<q", size)
            dtype = b"cnumpy\ndtype\n\x8c\x02f4\x89\x88\x87R"
            content = b"\x8e" + struct.pack("<Q", length) + b"abcd" * (length > 0)
            start = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tC\x01b\x87R(K\x01"
            for axes in (1, 8, 9):
                array = start + b"(" + shape * axes + b"t" + dtype + b"\x89" + content + b"tb"
                yield f"shape {size} in {axes} axes, {length} bytes", array + b"."
    frame = good.index(pickle.FRAME)
    for length in (0, 2**40, 2**64 - 1):
        # Frames are no more than a hint; what counts is that nothing is believed: the file has to be cut as well.
        yield f"frame of {length}", good[: frame + 1] + struct.pack("<Q", length) + good[frame + 9 : -50]


def wrong_trees(whole: dict[str, Any], rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """The right operations and the wrong arrays."""

    def changed(name: str, change: Callable[[dict[str, Any]], object]) -> tuple[str, bytes]:
        tree = copy.deepcopy(whole)
        change(tree)
        return name, dumped(tree)

    state_of = lambda tree: tree["train_state"]  # noqa: E731
    for key in whole:
        yield changed(f"without {key}", lambda tree, key=key: tree.pop(key))
        yield changed(f"{key} is None", lambda tree, key=key: tree.update({key: None}))
    yield changed("with a key more", lambda tree: tree.update(extra=1))
    yield changed("timestamp not a number", lambda tree: tree.update(_timestamp=float("nan")))
    for key in whole["train_state"]:
        yield changed(f"state without {key}", lambda tree, key=key: state_of(tree).pop(key))
        yield changed(f"state's {key} is a string", lambda tree, key=key: state_of(tree).update({key: "x"}))
    yield changed("state with rng", lambda tree: state_of(tree).update(rng=np.zeros(2, np.uint32)))
    yield changed("step is negative", lambda tree: state_of(tree).update(step=np.int32(-1)))
    yield changed("step is an array", lambda tree: state_of(tree).update(step=np.zeros(3, np.int32)))
    for tree_name in ("params", "params_ema"):
        names = [(group, key) for group, part in whole["train_state"][tree_name].items() for key in part]
        for group, key in names:

            def part(tree: dict[str, Any], group: str = group, tree_name: str = tree_name) -> dict[str, Any]:
                return state_of(tree)[tree_name][group]

            label = f"{tree_name}/{group}/{key}"
            yield changed(f"without {label}", lambda t, p=part, k=key: p(t).pop(k))
            yield changed(f"{label} twice", lambda t, p=part, k=key: p(t).update({k + "_": p(t)[k]}))
            for what, change in CHANGES.items():
                yield changed(
                    f"{label} {what}", lambda t, p=part, k=key, c=change: p(t).update({k: leafwise(p(t)[k], c)})
                )
    params = lambda tree: state_of(tree)["params"]  # noqa: E731
    yield changed("a name with a slash", lambda t: params(t).update({"Embed_0/embedding": rng.normal(size=3)}))
    yield changed("an empty name", lambda t: params(t).update({"": np.zeros(3, "f4")}))


def nan_in_the_middle(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[array.size // 2] = np.nan
    return array


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed and longer": lambda a: np.concatenate([a.T, a.T]),
    "empty": lambda a: a[:0],
    "not a number": nan_in_the_middle,
    "infinite": lambda a: np.full_like(a, np.inf),
    "whole": lambda a: a.astype("i4"),
    "double": lambda a: a.astype("f8"),
    "with an axis more": lambda a: a[None],
}


def leafwise(tree: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    if isinstance(tree, dict):
        return {key: leafwise(part, change) for key, part in tree.items()}
    return change(tree)


def main(folder: Path) -> None:
    """Convert them all; prints what each said, and the most memory held."""
    from shortcutflow.interop.convert import convert

    canary = folder / "canary"
    said: dict[str, str | None] = {}
    for name, content in cases(canary):
        file = folder / "hostile.pkl"
        file.write_bytes(content)
        try:
            convert(file, folder / "out", heads=2, image_size=8)
            said[name] = None
        except (ValueError, OSError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        file.unlink()
        assert not os.listdir(folder), f"{name} left {os.listdir(folder)}"
    # Of this process alone: what getrusage says begins with the size of the process that started it.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    memory = int(peak.split()[1]) * 1024
    print(json.dumps({"said": said, "memory": memory}))
