"""(d) Captions: tokens and a mask, read by cross-attention, dropped for guidance; on digits named by words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import shortcutflow as sf

# ---- the package

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["", "a", "the", "handwritten", "digit", *DIGITS]
TEMPLATES = ["{}", "a {}", "the digit {}", "a handwritten {}", "the handwritten digit {}"]
LENGTH = 5
NULL = {"tokens": torch.zeros(LENGTH, dtype=torch.int64), "mask": torch.arange(LENGTH) == 0}
"""The empty caption: one blank token."""


def tokenize(captions: list[str]) -> dict[str, Tensor]:
    """Tokens (b, 5) int64 and mask (b, 5) bool."""
    rows = [[WORDS.index(word) for word in caption.split()] for caption in captions]
    tokens = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    return {"tokens": tokens, "mask": tokens > 0}


def captions_of(labels: Tensor, generator: Generator) -> list[str]:
    chosen = torch.randint(len(TEMPLATES), (len(labels),), generator=generator)
    return [TEMPLATES[i].format(DIGITS[label]) for i, label in zip(chosen, labels, strict=True)]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.own = nn.MultiheadAttention(width, 4, batch_first=True)
        self.text = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, text: Tensor, padding: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.own(h, h, h, need_weights=False)[0]
        x = x + self.text(self.norms[1](x), text, text, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class TextToDigit(nn.Module):
    """Patches of 2x2 pixels of images (1, 8, 8) that attend to the caption."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patch, self.out = nn.Linear(4, width), nn.Linear(width, 4)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.time = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.words, self.place = nn.Embedding(len(WORDS), width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x_t: Tensor, t: Tensor, d: Tensor, y: dict[str, Tensor]) -> Tensor:
        x = x_t.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        level = d.clamp(min=1 / 128).log2() / 7
        x = self.patch(x) + self.position + self.time(torch.stack([t, level], dim=1))[:, None]
        text = self.words(y["tokens"]) + self.place.weight
        for block in self.blocks:
            x = block(x, text, ~y["mask"])
        return self.out(x).view(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 1, 8, 8)


# ---- what is checked


@pytest.mark.slow
def test_samples_show_what_the_caption_says() -> None:
    sklearn_datasets, svm = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.svm")
    digits = sklearn_datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels, reader = torch.tensor(digits.target), svm.SVC().fit(digits.images.reshape(-1, 64) / 8 - 1, digits.target)
    torch.manual_seed(0)
    net, generator = TextToDigit(), Generator().manual_seed(0)
    objective = sf.ShortcutObjective(condition_dropout=0.1)
    steps, optimizer = 500, torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    ema = sf.EMA(net, sf.EMAConfig(decay=0.95))
    for step in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        y = tokenize(captions_of(labels[rows], generator))
        objective(net, images[rows], y, target_net=ema.network, null_y=NULL, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update(net, step)

    def read(y: Any, wanted: Tensor, **options: Any) -> float:
        """Share of the samples that a classifier reads as wanted."""
        x = sf.sample(ema.network, (len(wanted), 1, 8, 8), y, steps=8, generator=Generator().manual_seed(1), **options)
        return float((torch.tensor(reader.predict(x.flatten(1).numpy())) == wanted).float().mean())

    wanted = torch.arange(200) % 10
    y = tokenize([f"the digit {DIGITS[i]}" for i in wanted])
    assert read(y, wanted, guidance_scale=2.0, null_y=NULL) > 0.6, "chance is 0.1"
    assert read(y, (wanted + 1) % 10, guidance_scale=2.0, null_y=NULL) < 0.2
    assert read(y, wanted, guidance_scale=0.0, null_y=NULL) < 0.3, "the empty caption says nothing"
