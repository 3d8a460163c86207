"""The demo's page: controls, and the images that they call for, written into the page itself.

No image is ever a file, so the server needs to serve none but Gradio's own scripts.
"""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr
import numpy as np
import torch

from shortcutflow.demo.answer import (
    ALL_CLASSES,
    MAX_GUIDANCE_SCALE,
    MAX_IMAGES,
    MAX_STEPS,
    Answer,
    Demo,
    Settings,
    listed,
)
from shortcutflow.evaluation.plots import x1_image
from shortcutflow.evaluation.sample_grid import image_grid, n_steps, save_image
from shortcutflow.models.model import Model

MOST_COLUMNS = 10
WAITING = 32
"""Pages that may wait for their answer at the same time."""
CSS = """
.answers {display: flex; flex-wrap: wrap; gap: 1.5rem}
.answers figure {flex: 1 1 18rem; min-width: 0; margin: 0}
.answers h2 {font-size: 1.1rem; margin: 0}
.answers p {margin: .2rem 0 .4rem}
.answers img {max-width: 100%; height: auto; border-radius: 4px}
.answers a {display: inline-block; padding: .5rem 0; text-decoration: underline}
.refusal {border-left: 4px solid #b91c1c; padding: .6rem .8rem; font-size: 1.05rem}
footer {display: none !important}
"""
logger = logging.getLogger(__name__)


def build_page(demo: Demo) -> gr.Blocks:
    """The page of a demo. Each browser sends all its settings with each change: the server keeps nothing of them."""
    title = " beside ".join(name_of(model) for model in demo.models)
    start, has_classes = Settings(), bool(demo.class_names)
    with gr.Blocks(title=f"shortcutflow: {title}", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nOne network, any number of steps, the same noise whatever the number.")
        with gr.Row():
            steps = gr.Slider(
                1, MAX_STEPS, start.steps, step=1, label="Number of steps", scale=3, min_width=320, elem_id="steps"
            )
            label = gr.Dropdown(
                [ALL_CLASSES, *zip(listed(demo.class_names), demo.class_names, strict=True)], value=ALL_CLASSES,
                label="Class", scale=1, min_width=120, elem_id="class", allow_custom_value=True, visible=has_classes,
            )  # fmt: skip
            seed = gr.Number(start.seed, label="Seed", scale=1, min_width=120, elem_id="seed")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                pictures = gr.HTML(elem_id="pictures")
            with gr.Column(scale=1, min_width=260):
                count = gr.Slider(1, MAX_IMAGES, start.count, step=1, label="Number of images", elem_id="count")
                guidance_scale = gr.Slider(
                    0, MAX_GUIDANCE_SCALE, start.guidance_scale, step=0.1, label="Guidance scale",
                    elem_id="guidance", visible=has_classes,
                )  # fmt: skip
                second_seed = gr.Number(start.second_seed, label="Second seed", elem_id="second-seed")
                u = gr.Slider(0, 1, start.u, step=0.01, label="From the seed to the second seed", elem_id="between")
        inputs = [steps, seed, label, guidance_scale, count, second_seed, u]
        # While one answer is on its way, only the last of all further changes is sent.
        gr.on(
            [page.load, *(control.change for control in inputs)], show_with(demo), inputs, pictures,
            trigger_mode="always_last", concurrency_limit=1, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page.queue(max_size=WAITING, api_open=False)


def name_of(model: Model) -> str:
    """A model's name and objective, without where it lies."""
    objective = model.config.about.get("objective")
    return model.name if objective is None else f"{model.name} ({objective.replace('_', ' ')})"


def show_with(demo: Demo) -> Callable[..., str]:
    """What answers a change: HTML, in which a refusal is a sentence."""

    def show(*values: Any) -> str:
        try:
            settings = demo.settings(*values)
            answers = demo.answers(settings)
        except ValueError as error:
            return _refusal(str(error))
        except torch.OutOfMemoryError:
            return _refusal("There is not enough memory for so many images: choose fewer.")
        except Exception:
            logger.exception("the demo could not answer")
            return _refusal("This went wrong; the terminal that the demo was started from says why.")
        figures = [_figure(demo, model, settings, a) for model, a in zip(demo.models, answers, strict=True)]
        return f'<div class="answers">{"".join(figures)}</div>'

    return show


def _refusal(sentence: str) -> str:
    sentence = sentence[:1].upper() + sentence[1:]
    return f'<p class="refusal" role="alert">{escape(sentence)}</p>'


def _figure(demo: Demo, model: Model, settings: Settings, answer: Answer) -> str:
    """A model's images, what they cost, the way to a file, and the path of the first image."""
    calls = f"{answer.calls} network call{'s' * (answer.calls > 1)}"
    steps, name = n_steps(settings.steps), name_of(model)
    of_class = "all classes in turn" if settings.label is None else f"class {demo.class_names[settings.label]}"
    about = f"{len(answer.images)} samples of {name}, {steps}, {of_class if demo.class_names else 'no classes'}"
    file = f"{model.name}_{settings.steps}steps_seed{settings.seed}.png"
    source = _png(grid_of(demo, settings, answer))
    path = _png(x1_image(answer.t, {"x_t": answer.path}, None, title=""))
    return (
        f"<figure><h2>{escape(name)}</h2>"
        f'<p aria-live="polite">{steps} · {calls} · {answer.milliseconds:.1f} ms</p>'
        f'<img class="samples" src="{source}" alt="{escape(about)}">'
        f'<a class="download" href="{source}" download="{escape(file)}">Download PNG</a>'
        f"<p>From noise to the first image:</p>"
        f'<img class="path" src="{path}" alt="States of the first image from t = 0, noise, to t = 1"></figure>'
    )


def grid_of(demo: Demo, settings: Settings, answer: Answer) -> np.ndarray:
    """The images, (height, width, 3) uint8: a column a class if there are few and each in turn, else a square."""
    names: tuple[str, ...] = ()
    columns = math.ceil(math.sqrt(len(answer.images)))
    if settings.label is None and 1 < len(demo.class_names) <= MOST_COLUMNS:
        names = demo.class_names[: len(answer.images)]
        columns = len(names)
    rows = answer.images.split(columns)
    return image_grid(rows, [""] * len(rows), column_titles=names, cell=48 if names else 96)


def _png(pixels: np.ndarray) -> str:
    """Pixels (h, w, 3) uint8 as a data: URL."""
    file = io.BytesIO()
    save_image(pixels, file)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
