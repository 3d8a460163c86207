"""One implementation's work, done when it is told to: a process of benchmarks/peers.py.

It is started as ``python peer_worker.py NAME SETTINGS`` by any interpreter that has NAME's packages; this library's are
needed for its own work, and by peers that are no network. It prints the names of its works as JSON, then reads one
name a line and prints the seconds that it took.

============== ==================================== ================================== =====================
peer           training                             sampling N                         loading
============== ==================================== ================================== =====================
shortcutflow   flow matching, AdamW, EMA            sample(steps=N)                    prepared shards
dit            its diffusion's loss, AdamW, EMA     N of its diffusion's steps, not 1  its crop, ImageFolder
sit            its transport's loss, AdamW, EMA     N Euler steps of its sampler       its crop, ImageFolder
cfm            its matcher, our network, AdamW, EMA
rectified-flow its loss, our network, AdamW, EMA    N Euler steps of its sampler
============== ==================================== ================================== =====================

"shortcut training" is that of shortcut-models and of this library's ``ShortcutObjective.released()``, and "shortcut
sampling N" that of networks which are told the step size. EMAs are kept in one fused call for all torch peers, which
none of them does as published.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

Work = dict[str, Callable[[], object]]
STEPS = (1, 4)


def ours(settings: dict[str, Any]) -> Work:
    """This library's."""
    import torch

    import shortcutflow as sf
    from shortcutflow.data.prepare import prepare
    from shortcutflow.data.stream import ShardStream

    x, y = torch_batch(settings)
    net = our_network(settings, released=False)
    null_y = settings["classes"]

    def loss_of(objective: Any, call: Any, average: Any) -> Any:
        return objective(call, x, y, target_net=average, null_y=null_y).loss

    def as_trained(objective: Any) -> Any:
        return objective.compiled(dynamic=False) if settings["compile"] else objective

    flow = partial(loss_of, as_trained(sf.FlowMatchingObjective(condition_dropout=0.1)))
    work: Work = {"training": training(net, flow, settings)}
    shortcut_net = our_network(settings, released=True)
    shortcut = partial(loss_of, as_trained(sf.ShortcutObjective.released(class_dropout_prob=0.1)))
    if settings["batch"] >= 8:
        work["shortcut training"] = training(shortcut_net, shortcut, settings)
    call, shortcut_call = (for_sampling(each, settings) for each in (net, shortcut_net))
    for steps in STEPS:
        work[f"sampling {steps}"] = partial(sf.sample, call, x, y, steps=steps, flow_only=True)
        work[f"shortcut sampling {steps}"] = partial(sf.sample, shortcut_call, x, y, steps=steps)
    if settings["images"] is not None:
        kept = tempfile.TemporaryDirectory()
        shards = Path(kept.name) / "shards"
        made = prepare(settings["images"], shards, size=256, format="jpg", workers=0, progress=False)
        stream = ShardStream(shards, batch_size=made.shards[0].samples, seed=0, cache_bytes=0, workers=0)

        def load(kept: Any = kept) -> None:
            next(stream)

        work["loading"] = load
    torch.manual_seed(0)
    return work


def dit(settings: dict[str, Any]) -> Work:
    """facebookresearch/DiT: its network, its diffusion's loss with learned variances, and that diffusion's sampler."""
    import torch

    net, diffusion = network_of("DiT", settings), importlib.import_module("diffusion")
    x, y = torch_batch(settings)
    full = diffusion.create_diffusion(timestep_respacing="")

    def loss_of(call: Any, average: Any) -> Any:
        t = torch.randint(0, full.num_timesteps, (len(x),), device=x.device)
        return full.training_losses(call, x, t, {"y": y})["loss"].mean()

    work = {"training": training(net, loss_of, settings)}
    call = for_sampling(net, settings)
    # Its schedule fails for one step.
    for steps in STEPS[1:]:
        sampler = diffusion.create_diffusion(str(steps))
        work[f"sampling {steps}"] = partial(
            torch.no_grad()(sampler.p_sample_loop), call, x.shape, x, clip_denoised=False, model_kwargs={"y": y},
            progress=False, device=x.device,
        )  # fmt: skip
    return work | loading_of(settings)


def sit(settings: dict[str, Any]) -> Work:
    """willisma/SiT: its network, the linear path's loss, and Euler steps of its ODE sampler."""
    import torch

    net, transport = network_of("SiT", settings), importlib.import_module("transport")
    x, y = torch_batch(settings)
    path = transport.create_transport()

    def loss_of(call: Any, average: Any) -> Any:
        return path.training_losses(call, x, {"y": y})["loss"].mean()

    work = {"training": training(net, loss_of, settings)}
    call, sampler = for_sampling(net, settings), transport.Sampler(path)
    for steps in STEPS:
        # It counts the ends of its steps.
        run = sampler.sample_ode(sampling_method="euler", num_steps=steps + 1)
        work[f"sampling {steps}"] = partial(torch.no_grad()(run), x, call, y=y)
    return work | loading_of(settings)


def cfm(settings: dict[str, Any]) -> Work:
    """atong01/conditional-flow-matching: its matcher around this library's network. It has no sampler of its own."""
    import torch

    matcher = importlib.import_module("torchcfm.conditional_flow_matching").ConditionalFlowMatcher(sigma=0.0)
    x, y = torch_batch(settings)

    def loss_of(call: Any, average: Any) -> Any:
        t, x_t, v = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (call(x_t, t, torch.zeros_like(t), y) - v).square().mean()

    return {"training": training(our_network(settings, released=False), loss_of, settings)}


def rectified_flow(settings: dict[str, Any]) -> Work:
    """lucidrains/rectified-flow-pytorch: its loss and sampler around this library's network."""
    import torch

    package = importlib.import_module("rectified_flow_pytorch.rectified_flow")
    x, y = torch_batch(settings)
    net = our_network(settings, released=False)

    class Flow(torch.nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = net

        def forward(self, x_t: Any, times: Any) -> Any:
            return self.net(x_t, times, torch.zeros_like(times), y)

    @cache
    def wrapped(call: Any) -> Any:
        return package.RectifiedFlow(
            Flow(call), mean_variance_net=False, time_cond_kwarg="times", data_shape=tuple(x.shape[1:]),
            odeint_kwargs={"method": "euler"},
        )  # fmt: skip

    work = {"training": training(net, lambda call, average: wrapped(call)(x), settings)}
    sampler = wrapped(for_sampling(net, settings))
    for steps in STEPS:
        # It counts the ends of its steps, and draws its noise itself.
        work[f"sampling {steps}"] = partial(torch.no_grad()(sampler.sample), batch_size=len(x), steps=steps + 1)
    return work


def shortcut_models(settings: dict[str, Any]) -> Work:
    """kvfrans/shortcut-models: its network, targets and train state, in float32 and compiled by jax, as published."""
    import jax
    import optax
    from jax import numpy as jnp

    network, targets = importlib.import_module("model"), importlib.import_module("targets_shortcut")
    states = importlib.import_module("utils.train_state")
    b, size, classes = settings["batch"], settings["size"], settings["classes"]
    flags = type("Flags", (), {"batch_size": b, "model": {
        "bootstrap_every": 8, "denoise_timesteps": 128, "bootstrap_dt_bias": 0, "bootstrap_ema": 1, "bootstrap_cfg": 0,
        "class_dropout_prob": 0.1, "num_classes": classes, "cfg_scale": 4.0,
    }})  # fmt: skip
    net = network.DiT(
        patch_size=settings["patch"], hidden_size=settings["width"], depth=settings["depth"],
        num_heads=settings["heads"], mlp_ratio=4, out_channels=settings["channels"], class_dropout_prob=0.1,
        num_classes=classes, dtype=jnp.float32,
    )  # fmt: skip
    key = jax.random.PRNGKey(0)
    x = jax.random.normal(key, (b, size, size, settings["channels"]))
    y, zeros = jnp.zeros((b,), jnp.int32), jnp.zeros((b,))
    rngs = {"params": key, "label_dropout": key, "dropout": key}
    params = net.init(rngs, x, zeros, zeros, y)["params"]
    held = [states.TrainStateEma.create(net, params, rng=key, tx=optax.adamw(1e-4, weight_decay=0.1))]

    @jax.jit
    def update(state: Any) -> tuple[Any, Any]:
        rng, target_key, dropout_key = jax.random.split(state.rng, 3)
        x_t, v, t, level, labels, _ = targets.get_targets(flags, target_key, state, x, y)

        def loss_of(params: Any) -> Any:
            out = state.call_model(x_t, t, level, labels, train=True, rngs={"dropout": dropout_key}, params=params)
            return jnp.mean((out - v) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, optimizer = state.tx.update(gradients, state.opt_state, state.params)
        state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=optimizer, rng=rng)
        return state.update_ema(0.999), loss

    @jax.jit
    def velocity(state: Any, x_t: Any, t: Any, level: Any) -> Any:
        return state.call_model_ema(x_t, t, level, y, train=False)

    def train() -> None:
        held[0], loss = update(held[0])
        loss.block_until_ready()

    def sampled(steps: int) -> None:
        x_t, level = x, jnp.full((b,), float(steps.bit_length() - 1))
        for i in range(steps):
            x_t = x_t + velocity(held[0], x_t, jnp.full((b,), i / steps), level) / steps
        x_t.block_until_ready()

    work: Work = {"shortcut training": train}
    return work | {f"shortcut sampling {n}": partial(sampled, n) for n in STEPS}


# ---- what several of them need


def torch_batch(settings: dict[str, Any]) -> tuple[Any, Any]:
    """A batch of data and its labels."""
    import torch

    shape = settings["batch"], settings["channels"], settings["size"], settings["size"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(settings["device"])
    return x, torch.arange(len(x), device=x.device) % settings["classes"]


def our_network(settings: dict[str, Any], *, released: bool) -> Any:
    """This library's DiT."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import backbones

    shape = settings["channels"], settings["size"], settings["size"]
    sizes = {name: settings[name] for name in ("width", "depth", "heads", "patch")}
    net = backbones.create("dit", shape=shape, num_classes=settings["classes"], released=released, **sizes)
    return net.to(settings["device"])


def network_of(name: str, settings: dict[str, Any]) -> Any:
    """The network of this name in the checkout's ``models.py``."""
    build = getattr(importlib.import_module("models"), name)
    return build(
        input_size=settings["size"], patch_size=settings["patch"], in_channels=settings["channels"],
        hidden_size=settings["width"], depth=settings["depth"], num_heads=settings["heads"],
        num_classes=settings["classes"],
    ).to(settings["device"])  # fmt: skip


def compiled(net: Any, settings: dict[str, Any]) -> Any:
    """The network, compiled if it should be."""
    import torch

    return torch.compile(net, dynamic=False) if settings["compile"] else net


def for_sampling(net: Any, settings: dict[str, Any]) -> Any:
    """A copy of the network in evaluation mode, which training leaves alone."""
    return compiled(copy.deepcopy(net).eval().requires_grad_(False), settings)


def training(net: Any, loss_of: Callable[[Any, Any], Any], settings: dict[str, Any]) -> Callable[[], object]:
    """One step of ``loss_of(network, average)`` with AdamW and an EMA."""
    import torch

    net.train()
    average = copy.deepcopy(net).requires_grad_(False).eval()
    weights = [p for p in net.parameters() if p.requires_grad]
    averaged = [p for p, of in zip(average.parameters(), net.parameters(), strict=True) if of.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1, fused=True)
    call, target = compiled(net, settings), compiled(average, settings)

    def step() -> None:
        loss = loss_of(call, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(averaged, [p.detach() for p in weights], 0.001)
        loss.item()

    return step


def loading_of(settings: dict[str, Any]) -> Work:
    """All pictures once, as the checkout's training script loads them."""
    if settings["images"] is None:
        return {}
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = importlib.import_module("train").center_crop_arr
    chain = [transforms.Lambda(lambda image: crop(image, 256)), transforms.RandomHorizontalFlip()]
    chain += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True)]
    folder = ImageFolder(settings["images"], transforms.Compose(chain))
    loader = torch.utils.data.DataLoader(folder, batch_size=len(folder), shuffle=True)

    def load() -> None:
        for _ in loader:
            pass

    return {"loading": load}


WORKERS = {
    "shortcutflow": ours, "dit": dit, "sit": sit, "cfm": cfm, "rectified-flow": rectified_flow,
    "shortcut-models": shortcut_models,
}  # fmt: skip


def main() -> None:
    """Answer until the input ends."""
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    # Others print what they like: to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Ahead of this script's folder and of what is installed: the checkout's own modules, which have plain names.
    sys.path[0] = settings["checkout"]
    work = WORKERS[name](settings)
    print(json.dumps(list(work)), file=answers, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        work[line.strip()]()
        if settings["device"] == "cuda":
            import torch

            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - begin), file=answers, flush=True)


if __name__ == "__main__":
    main()
