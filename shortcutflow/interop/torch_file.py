"""Tensors of a file that ``torch.save`` or safetensors wrote, read without running anything that is in it."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortcutflow.config import CURRENT
from shortcutflow.io.safetensors import read_tensors

KEYS = {
    **dict.fromkeys(("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema"), "ema"),
    **dict.fromkeys(("model", "state_dict", "model_state_dict", "net", "network", "module", "params"), CURRENT),
}
"""Where training checkpoints keep their weights, and what these are called here; the first that is there counts."""
LONGEST_PICKLE = 2**26
"""Bytes that may describe the tensors; their numbers lie outside of the pickle."""
MOST_MEMBERS = 100_000
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "ema_model.")
"""What DDP, torch.compile, Lightning and wrappers of an EMA put before every name."""
NESTED = ("state_dict", "model", "module", "shadow")
"""Keys below which an entry of a training checkpoint may keep its state dict."""
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file of ``torch.save`` before version 1.6."""


def read_state_dicts(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file, their numbers left in the file until they are used.

    Returns:
        Tensors by name, as "current" or "ema" by the keys under which a training checkpoint keeps them; "current" for a
        file that is a state dict itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if it is no such file, is damaged, refers to code, or claims more than it holds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return {CURRENT: _checked(read_tensors(path, "get it again from where it came from")[0], path)}
    _check_archive(path)
    content = _loaded(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no dictionary of tensors")
    found: dict[str, dict[str, Tensor]] = {}
    for key, name in KEYS.items():
        value = content.get(key)
        while isinstance(value, Mapping) and (inner := [value[k] for k in NESTED if isinstance(value.get(k), Mapping)]):
            value = inner[0]
        if isinstance(value, Mapping) and name not in found:
            found[name] = _checked(value, path)
    return found or {CURRENT: _checked(content, path)}


def is_torch_file(path: Path) -> bool:
    """Whether a file looks like one of ``torch.save`` or safetensors, from its first bytes and its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    return path.suffix == ".safetensors" or start.startswith(b"PK\x03\x04") or start == LEGACY


def _check_archive(path: Path) -> None:
    """Refuse what is no archive, archives of programs, and archives that grow when they are read."""
    with path.open("rb") as file:
        if file.read(len(LEGACY)) == LEGACY:
            raise ValueError(
                f"{path} has torch.save's format from before version 1.6, which is not read here: write it anew with "
                "torch.save(torch.load(FILE, weights_only=True), NEW_FILE)"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"{path} is no file of torch.save since version 1.6, or is cut off: {' '.join(str(error).split())}"
        ) from None
    names = [member.filename.partition("/")[2] for member in members[:MOST_MEMBERS]]
    for program, sign in (("torch.jit", "constants.pkl"), ("torch.export", "archive_format")):
        if sign in names:
            raise ValueError(f"{path} is a program of {program}, which is not read: save the network's state_dict()")
    if len(members) > MOST_MEMBERS:
        raise ValueError(f"{path} has {len(members)} parts; {MOST_MEMBERS} are allowed")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {member.filename!r} is compressed, which torch.save never does")
        if member.filename.endswith("data.pkl") and member.file_size > LONGEST_PICKLE:
            raise ValueError(f"{path}: its pickle has {member.file_size} bytes; {LONGEST_PICKLE} are allowed")
    claimed, size = sum(member.file_size for member in members), path.stat().st_size
    if claimed > size:
        raise ValueError(f"{path} claims {claimed} bytes and has {size}: cut off or made up")


def _loaded(path: Path) -> Any:
    try:
        # Training scripts keep their arguments beside the tensors; a namespace is names and values only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a made-up pickle can make the reader fail in any way
        reason = " ".join(str(error).split())
        if named := re.search(r"GLOBAL (\S+)", reason):
            raise ValueError(
                f"{path}: refused, it names {named[1]!r}, which no dictionary of tensors needs; if that is the class "
                "of a network that was saved whole, save its state_dict() instead"
            ) from None
        # What precedes is advice to run the file after all.
        if "Weights only" in reason:
            reason = reason.rpartition("WeightsUnpickler error:")[2] if "WeightsUnpickler" in reason else ""
        reason = reason.strip().partition(" Check the documentation")[0][:200] or type(error).__name__
        raise ValueError(f"{path}: refused, it is damaged or no dictionary of tensors: {reason}") from None


def _checked(tensors: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Ordinary tensors of ordinary names, together no larger than the file."""
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} is no dictionary of tensors: {str(name)[:60]!r} is a {type(tensor).__name__}; known are state "
                "dicts, by themselves or under 'ema', 'model' or 'state_dict'"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} must hold plain floating-point numbers, it is {tensor.dtype}")
        total += tensor.numel() * tensor.element_size()
    # A tensor can repeat one number for ever, and each of many can be all of one part of the file.
    if total > path.stat().st_size:
        raise ValueError(f"{path}: its tensors claim {total} bytes, the file has {path.stat().st_size}")
    while tensors and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in tensors)), None)):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return dict(tensors)
