"""The demo in a real browser: pictures that are the digits asked for, at any pace, by keyboard, and on a phone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from recipes.digits import recipe
from shortcutflow.cli import main
from shortcutflow.demo.answer import Demo, Settings
from shortcutflow.demo.page import grid_of
from shortcutflow.evaluation.features.digits import DigitExtractor
from tests.demo.browsing import (
    choose,
    downloaded,
    needs_chromium,
    opened,
    served,
    set_number,
    started_browser,
    wait_for,
)

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
PHONE = {"width": 390, "height": 844}
pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A short run of the digits, and one of flow matching."""
    folder = tmp_path_factory.mktemp("runs")
    short = [
        "training.steps=600", "training.grid_every=0", "evaluation=null", "data.workers=0",
        f"data.folder={folder / 'digits'}",
    ]  # fmt: skip
    chosen = {"shortcut": [recipe().name, *short], "flow": ["digits_paper", "--objective", "flow_matching", *short]}
    for name, options in chosen.items():
        with pytest.raises(SystemExit) as stop:
            main(["train", *options, "--run-dir", str(folder / name)])
        assert stop.value.code == 0
    return [str(folder / name) for name in chosen]


@pytest.fixture(scope="module")
def demo(runs: list[str]) -> Demo:
    return Demo.open(*runs)


@pytest.fixture(scope="module")
def url(demo: Demo) -> Iterator[str]:
    with served(demo) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url) as page:
        yield page


def digits_in(grid: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """The 8x8 images of a full grid of one class, (n, 8, 8, 3) uint8."""
    side = 96
    left, top = grid.shape[1] - columns * (side + 2), grid.shape[0] - rows * (side + 2)
    cells = [
        grid[top + i * (side + 2) :, left + j * (side + 2) :][:side:12, :side:12]
        for i in range(rows)
        for j in range(columns)
    ]
    return np.stack(cells)


def test_pictures_are_the_digits_that_were_asked_for(page: Page) -> None:
    set_number(page, "count", 36)
    choose(page, "3")
    pictures = {}
    for steps in (1, 4, 128):
        set_number(page, "steps", steps)
        wait_for(page, steps)
        expect(page.locator("img.samples").first).to_have_attribute("alt", re.compile(r"^36 samples .* class 3$"))
        pictures[steps] = downloaded(page)
        read = DigitExtractor().read(digits_in(pictures[steps], 6, 6))
        assert np.mean(read == 3) >= 0.7, (steps, read)
    assert not np.array_equal(pictures[1], pictures[4])
    assert not np.array_equal(pictures[4], pictures[128])
    flow = DigitExtractor().read(digits_in(downloaded(page, run=1), 6, 6))
    assert np.mean(flow == 3) >= 0.7, "flow matching needs many steps, and has them"


def test_the_page_shows_what_the_library_makes(page: Page, demo: Demo) -> None:
    set_number(page, "seed", 5)
    set_number(page, "steps", 2)
    wait_for(page, 2)
    expect(page.locator("a.download").first).to_have_attribute("download", re.compile("2steps_seed5"))
    settings = Settings(steps=2, seed=5)
    for run, answer in enumerate(demo.answers(settings)):
        assert np.array_equal(downloaded(page, run), grid_of(demo, settings, answer))


def test_between_two_seeds(page: Page, demo: Demo) -> None:
    before = page.locator("img.samples").first.get_attribute("src")
    page.locator("#between input[type=range]").focus()
    page.keyboard.press("End")
    expect(page.locator("img.samples").first).not_to_have_attribute("src", before or "")
    page.wait_for_timeout(500)
    settings = Settings(seed=1)
    assert np.array_equal(downloaded(page), grid_of(demo, settings, demo.answers(settings)[0]))


def test_refusals_are_polite_and_are_left_again(page: Page) -> None:
    refusal = page.locator("p.refusal[role=alert]")
    choose(page, "77")
    expect(refusal).to_have_text(
        "There is no class '77': choose one of the list, a number from 0 to 9, or 'all in turn'"
    )
    shoot(page, "refused")
    choose(page, "4")
    expect(refusal).to_have_count(0)
    set_number(page, "seed", -1)
    expect(refusal).to_have_text("The seed must be a whole number from 0 to 4294967295, got -1")
    set_number(page, "seed", 1.5)
    expect(refusal).to_have_text("The seed must be a whole number from 0 to 4294967295, got 1.5")
    page.locator("#seed input").fill("")
    expect(refusal).to_have_text("The seed must be a whole number from 0 to 4294967295, got nothing")
    assert "Traceback" not in page.content()
    set_number(page, "seed", 1)
    wait_for(page, 1)


def test_many_changes_at_once_end_with_the_last(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    steps = page.locator("#steps input[type=range]")
    steps.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    wait_for(page, 21)
    page.wait_for_timeout(1000)
    wait_for(page, 21)
    assert 1 <= len(asked) <= 20
    start = time.perf_counter()
    set_number(page, "steps", 1)
    wait_for(page, 1)
    assert time.perf_counter() - start < 10, "nothing older waits before it"


def test_two_browsers_do_not_mix(page: Page, browser: Browser, url: str, demo: Demo) -> None:
    with opened(browser, url) as other:
        for seed in (11, 12, 13):
            set_number(page, "seed", seed)
            set_number(other, "seed", seed + 100)
            set_number(other, "steps", 3)
            set_number(page, "steps", 2)
        for at, steps, seed in ((page, 2, 13), (other, 3, 113)):
            wait_for(at, steps)
            expect(at.locator("a.download").first).to_have_attribute("download", re.compile(f"{steps}steps_seed{seed}"))
            settings = Settings(steps=steps, seed=seed)
            assert np.array_equal(downloaded(at), grid_of(demo, settings, demo.answers(settings)[0]))


def test_by_keyboard_alone(page: Page) -> None:
    page.locator("#steps input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    wait_for(page, 2)
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(e => e.getAttribute('aria-label') ?? e.innerText)(document.activeElement)"))
    names = " ".join(reached)
    for control in ("Class", "Seed", "Download PNG", "Number of images", "Guidance scale", "Second seed"):
        assert control in names, reached


@pytest.mark.parametrize(("name", "size"), [("desktop", {"width": 1280, "height": 900}), ("phone", PHONE)])
def test_how_it_looks(page: Page, name: str, size: dict[str, int]) -> None:
    """Nothing is wider than the window; the pictures are left in build/screenshots to be looked at."""
    page.set_viewport_size({"width": size["width"], "height": size["height"]})
    set_number(page, "steps", 4)
    wait_for(page, 4)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('#pictures p, #pictures a, label span')]"
        ".filter(e => e.innerText && e.offsetParent).map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    shoot(page, name)


def shoot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"demo_{name}.png", full_page=True)
