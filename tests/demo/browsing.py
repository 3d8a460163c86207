"""A real browser for the demo's page, and what a person does in it."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from shortcutflow.demo.answer import Demo
from shortcutflow.demo.server import listen, server_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STATUS = re.compile(r"^(\d+) steps? · (\d+) network calls? · \d+\.\d ms$")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on this machine: apt-get install chromium"
)


@contextmanager
def started_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(demo: Demo) -> Iterator[str]:
    """Serve a demo in a thread; gives its URL."""
    with listen("127.0.0.1", 0) as listening:
        server = server_of(demo)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """The page, with its first answer; nothing may fail in it, and nothing may be asked of another host."""
    with browser.new_context(accept_downloads=True) as context:
        page = context.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        # The page itself ends the stream of answers when it waits for none.
        page.on("requestfailed", lambda r: None if "/queue/data" in r.url else wrong.append(f"failed: {r.url}"))
        page.on("request", lambda r: None if r.url.startswith((url, "data:")) else wrong.append(r.url))
        page.goto(url)
        wait_for(page, 1)
        yield page
        assert wrong == []


def set_number(page: Page, control: str, value: int | float) -> None:
    """Type into the number field of a control."""
    field = page.locator(f"#{control} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def choose(page: Page, name: str) -> None:
    """Choose a class by its name, by keyboard."""
    field = page.locator("#class input")
    field.fill(name)
    field.press("Enter")
    field.press("Tab")


def wait_for(page: Page, steps: int) -> None:
    """Until the first run's images are those of so many steps, each one network call."""
    status = page.locator("#pictures figure p").first
    expect(status).to_have_text(re.compile(rf"^{steps} steps? ·"), timeout=60_000)
    found = STATUS.match(status.inner_text())
    assert found is not None
    assert found[1] == found[2] == str(steps)


def downloaded(page: Page, run: int = 0) -> np.ndarray:
    """The PNG that the page offers of a run, (height, width, 3) uint8."""
    with page.expect_download() as waiting:
        page.locator("a.download").nth(run).click()
    assert re.fullmatch(r"\w+_\d+steps_seed\d+\.png", waiting.value.suggested_filename)
    return np.asarray(Image.open(BytesIO(waiting.value.path().read_bytes())))
