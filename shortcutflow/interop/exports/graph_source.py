"""A traced network as Python source: a class that needs torch and diffusers alone, its weights in safetensors.

Unlike a serialised graph it needs no pickle, says in plain text what it computes, and does not depend on a version of a
file format, only on PyTorch's operators.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from shortcutflow.interop.exports.traced import graphs

CLASS = "ShortcutNetwork"
HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
"""Kinds of inputs of a graph that are tensors of the network; the others are what it is called with."""
KNOWN = ("torch", "inf", "nan")
"""Names that the source of a graph may use."""

HEAD = '''"""A network s(x_t, t, d, y), written out by shortcutflow {version} from its backbone {backbone!r}.

Made by a program: lines of PyTorch's operators in the order they run. The weights lie beside it, as safetensors.
"""

from math import inf, nan  # noqa: F401

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

'''

BODY = '''

class ShortcutNetwork(ModelMixin, ConfigMixin):
    """The average velocity over [t, t + d] from noise (t = 0) to data (t = 1), in float32.

    Args:
        sample_shape: of a sample.
        num_classes: labels; label num_classes is the null condition. None: no labels.
        condition_shape: of the tensor a sample is conditioned on, or None.
        null_condition: the label, or the number the tensor is filled with, that stands for no condition.
        finest_steps: the finest budget of the training.
        flow_only: the network is told d = 0 at every step.
        sampler: "euler", "consistency" or "live_reflow".
        latents_of: the autoencoder whose latents the samples are, or None.
    """

    TENSORS = {tensors}
    """Name, shape, type, and whether it is learned, in the order in which the graph takes them."""

    @register_to_config
    def __init__(
        self, sample_shape, num_classes=None, condition_shape=None, null_condition=None, finest_steps=128,
        flow_only=False, sampler="euler", latents_of=None,
    ):
        super().__init__()
        self.network = nn.Module()
        for name, shape, dtype, learned in self.TENSORS:
            *path, last = name.split(".")
            module = self.network
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
            if learned:
                module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(last, tensor)

    def forward(self, x_t, t, d, y=None):
        """x_t (b, *sample_shape), t and d (b,) in [0, 1], y labels (b,) int64 or (b, *condition_shape), to x_t's."""
        if self.dtype != torch.float32:
            raise ValueError(f"this network computes in float32, not {{self.dtype}}; use torch.autocast for less")
        held = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        return self.graph(*(held[name] for name, *_ in self.TENSORS), x_t, t, d, y)[0]

'''


def source_of(program: ExportedProgram, *, backbone: str, version: str) -> tuple[str, dict[str, Tensor]]:
    """Python source of a traced network, called as net(x_t, t, d, y), and its state dict.

    Args:
        program: from :func:`shortcutflow.interop.exports.traced.trace`; it is changed.
        backbone: its name, for the heading.
        version: of this library, for the heading.

    Raises:
        ValueError: if the graph holds what has no source.
    """
    held = [spec for spec in program.graph_signature.input_specs if spec.kind in HELD]
    if any(spec.kind not in (*HELD, InputKind.USER_INPUT) for spec in program.graph_signature.input_specs):
        raise ValueError(f"backbone {backbone!r} holds objects that are no tensors, which have no source")
    found = {**program.state_dict, **program.constants}
    tensors = {str(spec.target): found[str(spec.target)].detach().cpu().clone() for spec in held}
    table = [
        (str(spec.target), list(tensor.shape), str(tensor.dtype).removeprefix("torch."), _learned(spec.kind, tensor))
        for spec, tensor in zip(held, tensors.values(), strict=True)
    ]
    rows = "[\n" + "".join(f"        {row!r},\n" for row in table) + "    ]"
    head, body = HEAD.format(version=version, backbone=backbone), BODY.format(tensors=rows)
    return head + body + "\n".join(_methods(program)), {f"network.{name}": held for name, held in tensors.items()}


def module_name(source: str) -> str:
    """A name for the module that is another for another network: diffusers keeps all of them in one folder."""
    return f"shortcut_network_{hashlib.sha256(source.encode()).hexdigest()[:12]}"


def _learned(kind: InputKind, tensor: Tensor) -> bool:
    return kind is InputKind.PARAMETER and tensor.is_floating_point()


def _methods(program: ExportedProgram) -> list[str]:
    """The graph as a method, and those nested in it as others."""
    whole = program.graph_module
    names = {name: part for name, part in whole.named_modules() if name and isinstance(part, GraphModule)}
    if any("." in name for name in names):
        raise ValueError("the network's graph has graphs within nested graphs, which have no source")
    bare = {name for name in names for node in _callers(program, name) if _is_without_autocast(node)}
    for part in graphs(program):
        _use_methods(part.graph)
        _use_device_of_inputs(part.graph)
    methods = [_method("graph", whole.graph)]
    for name, part in names.items():
        text = _method(name, part.graph)
        methods.append(_WITHOUT_AUTOCAST.format(name=name) + text.replace("def ", "def _", 1) if name in bare else text)
    return methods


_WITHOUT_AUTOCAST = """    def {name}(self, *inputs):
        tensor = next(value for value in inputs if isinstance(value, torch.Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return self._{name}(*inputs)

"""


def _callers(program: ExportedProgram, name: str) -> list[Node]:
    """Nodes that run the nested graph of that name."""
    nodes = program.graph_module.graph.nodes
    return [user for node in nodes if node.op == "get_attr" and node.target == name for user in node.users]


def _is_without_autocast(node: Node) -> bool:
    if node.target is torch.ops.higher_order.wrap_with_autocast:
        if node.args[2] is not False:
            raise ValueError("the network switches autocast on inside, which has no source")
        return True
    return False


_REGIONS = {torch.ops.higher_order.wrap_with_autocast: 4, torch.ops.higher_order.wrap_with_set_grad_enabled: 1}
"""Operators that run a nested graph in a context, and the place of that graph among their arguments."""
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


def _use_methods(graph: Graph) -> None:
    """Turn the running of nested graphs into calls of methods, and drop checks of the machine it was traced on."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and not all(user.target in _REGIONS for user in node.users):
            raise ValueError(f"the network's graph holds {node.target}, which has no source")
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif node.target in _REGIONS:
            place = _REGIONS[node.target]
            nested: Any = node.args[place]
            with graph.inserting_before(node):
                call = graph.create_node("call_module", nested.target, tuple(node.args[place + 1 :]))
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            if not nested.users:
                graph.erase_node(nested)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ValueError(f"the network's graph holds {node.target}, which has no source")


def _use_device_of_inputs(graph: Graph) -> None:
    """New tensors shall be where the inputs are, not where the network was traced."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        # The last that is a tensor: a condition that is None comes after it.
        tensor = next(node for node in reversed(inputs) if isinstance(node.meta.get("val"), Tensor))
        device = graph.call_function(getattr, (tensor, "device"))

    def instead(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, instead), map_aggregate(node.kwargs, instead)
    if not device.users:
        graph.erase_node(device)


def _method(name: str, graph: Graph) -> str:
    """A graph's source as a method of that name."""
    code = graph.python_code("self")
    for used in code.globals:
        if used not in KNOWN and re.search(rf"(?<![.\w]){used}\b(?! =)", code.src):
            raise ValueError(f"the network's graph uses {used}, which has no source")
    text = re.sub(r"^def forward\(self(.*)\)( -> .*)?:", rf"def {name}(self\1):", code.src.strip(), count=1)
    return "\n".join("    " + line if line.strip() else "" for line in text.splitlines()) + "\n"
