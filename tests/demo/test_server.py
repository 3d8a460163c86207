"""The demo's page over HTTP: the page itself and nothing else, and every answer or refusal is HTML."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from shortcutflow.cli import main
from shortcutflow.demo.answer import Demo, Settings
from shortcutflow.demo.page import grid_of, name_of, show_with
from shortcutflow.demo.server import MOST_BYTES, application, listen
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
from tests.evaluation.evaluating import Plain, plain_model


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(plain_model(), plain_model(network=Plain(shift=0.5)))


@pytest.fixture(scope="module")
def client(demo: Demo) -> Iterator[TestClient]:
    with TestClient(application(demo), raise_server_exceptions=False) as client:
        yield client


def test_the_page_is_served_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "plain beside plain" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    theme = client.get("/theme.css")
    assert theme.status_code == 200
    assert not re.search(r"@import|url\(['\"]?(https?:|//)", theme.text), "no fonts from elsewhere"
    assert str(Path.cwd()) not in page.text + client.get("/config").text


REFUSED = [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml", "/file=/etc/passwd", "/file/etc/passwd",
    "/gradio_api/file=..%2f..%2fetc%2fpasswd", "/assets/%2e%2e/%2e%2e/%2e%2e/blocks.py", "/static/..%2f..%2fblocks.py",
    "/static/%2e%2e/%2e%2e/%2e%2e/blocks.py", "/assets//etc/passwd", "/assets/..\\..\\blocks.py", "/svelte/x",
    "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/upload_progress", "/gradio_api/openapi.json", "/docs",
    "/openapi.json", "/monitoring", "/gradio_api/vibe-code", "/gradio_api/runs", "/gradio_api/deep_link", "/login",
    "/gradio_api/custom_component/0/client/component/index.js", "//etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404, response.text
    assert response.text == "This server has the demo's page and nothing else."


def test_nothing_can_be_sent_but_settings(client: TestClient) -> None:
    for path in ("upload", "run/predict", "api/show", "call/show", "vibe-edit", "component_server", "reset"):
        assert client.post(f"/gradio_api/{path}", json={}).status_code == 404, path
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert client.request(method, "/").status_code == 404, method
    join = "/gradio_api/queue/join"
    assert client.post(join, content=b" " * (MOST_BYTES + 1)).status_code == 413
    assert client.post(join, content=iter([b"{}"])).status_code == 411
    assert client.post(join, json={"data": [], "fn_index": 99, "session_hash": "a"}).status_code >= 400


def pictures(html: str) -> list[np.ndarray]:
    """All images of an answer."""
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'<img[^>]*src="data:image/png;base64,([^"]+)"', html)
    ]


def test_an_answer_shows_both_runs(demo: Demo) -> None:
    show = show_with(demo)
    html = show(4, 0, "all in turn", 1, 20, 1, 0)
    assert html.count("4 steps · 4 network calls · ") == 2
    grid, path, other_grid, _ = pictures(html)
    assert grid.shape == other_grid.shape
    assert not np.array_equal(grid, other_grid)
    assert path.shape[1] > path.shape[0]
    assert html.count('download="plain_4steps_seed0.png"') == 2
    again = pictures(show(4, 0, "all in turn", 1, 20, 1, 0))
    assert np.array_equal(again[0], grid)
    assert "1 step · 1 network call · " in show(1, 0, "7", 1, 4, 1, 0)


def test_refusals_are_sentences(demo: Demo, caplog: pytest.LogCaptureFixture) -> None:
    show = show_with(demo)
    refused = show(1, 0, "<script>", 1, 20, 1, 0)
    assert refused.startswith('<p class="refusal" role="alert">There is no class &#x27;&lt;script&gt;&#x27;: choose')
    assert "<img" not in refused
    broken = show_with(Demo(plain_model(network=Broken())))
    assert "went wrong" in broken(1, 0, None, 1, 20, 1, 0)
    assert "Traceback" not in broken(1, 0, None, 1, 20, 1, 0)
    assert "inside" in caplog.text, "the terminal says why"


class Broken(Plain):
    """A network with a defect."""

    def forward(self, *inputs: object) -> None:  # type: ignore[override]
        raise RuntimeError("inside")


def test_names_do_not_say_where_a_run_lies(demo: Demo) -> None:
    model = demo.models[0]
    config = model.config.model_copy(update={"about": {"objective": "flow_matching"}})
    assert name_of(type(model)(model.network, config, "ema", Path("/secret/place"), "digits")) == (
        "digits (flow matching)"
    )


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for options, reason in (
            ([f"--port={port}"], f"cannot listen at 127.0.0.1, port {port}: "),
            (["--port=70000"], "cannot listen at 127.0.0.1, port 70000: "),
            (["--host=nowhere.invalid"], "cannot listen at nowhere.invalid, port 7860: "),
        ):
            with pytest.raises(SystemExit) as stop:
                main(["demo", "runs/none", *options])
            assert stop.value.code == 2
            error = capsys.readouterr().err
            assert reason in error
            assert len(error.strip().splitlines()) == 1


@needs_chromium
def test_a_browser_shows_answers_and_refusals(demo: Demo) -> None:
    """tests/demo/test_browser.py has all that a person does, on trained digits; this one needs no training."""
    with served(demo) as url, started_browser() as browser, opened(browser, url) as page:
        set_number(page, "steps", 3)
        wait_for(page, 3)
        settings = Settings(steps=3)
        for run, answer in enumerate(demo.answers(settings)):
            assert np.array_equal(downloaded(page, run), grid_of(demo, settings, answer))
        choose(page, "77")
        page.get_by_text("There is no class '77'").wait_for()
