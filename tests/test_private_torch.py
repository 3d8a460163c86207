"""What the code uses of torch beyond its public interface: little, listed here, and still there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch._subclasses.fake_tensor
from torch import nn

import backbones
import shortcutflow

PRIVATE = {
    # Autograd inside an operator, which no public name allows; see backbones/recurrence.py.
    "torch._C._dispatch_tls_local_exclude_set",
    "torch._C._dispatch_tls_local_include_set",
    "torch._C._ForceDispatchKeyGuard",
    "torch._C.DispatchKey.AutogradFunctionality",
    "torch._C.DispatchKey.ADInplaceOrView",
    # Shapes without numbers, to count operations. torch's own documentation names it.
    "torch._subclasses.fake_tensor.FakeTensorMode",
    # A few launches for all weights of a network, or all metrics.
    "torch._foreach_add_",
    "torch._foreach_copy_",
    "torch._foreach_lerp_",
    "torch._foreach_norm",
    # What an exported graph is made of.
    "torch._ops.OpOverload",
}


def names_in(source: str) -> set[str]:
    source = re.sub(r"from (torch[.\w]*) import (\w+)", r"\1.\2", source)
    return set(re.findall(r"\btorch(?:\.[a-z]\w*)*\._[a-zA-Z]\w*(?:\.\w+)*", source))


def test_private_names_of_torch() -> None:
    used: set[str] = set()
    for package in (backbones, shortcutflow):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            used |= names_in(path.read_text())
    assert used - {"torch._C"} == PRIVATE, "new ones belong into the list, unless a public name does the same"
    for name in PRIVATE:
        found: Any = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part)


def test_private_attributes_of_modules() -> None:
    """Those by which adapt() sees earlier hooks and compilations."""
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    hook = module.register_forward_hook(print)
    assert list(module._forward_hooks.values()) == [print]
    hook.remove()
    assert torch.compile(module)._orig_mod is module
    module.compile()
    assert module._compiled_call_impl is not None


def test_fused_adamw_reads_found_inf() -> None:
    """An attribute that torch.amp.GradScaler sets: by it the training loop updates the weights without a wait."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for found_inf, expected in ((1.0, 1.0), (0.0, 0.9)):
        weight.grad = torch.ones(2)
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()
        assert torch.allclose(weight, torch.tensor(expected), atol=2e-3)
