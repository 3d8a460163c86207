"""Serves the demo's page and nothing else: no files, no uploads, no API, nothing from other hosts."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shortcutflow.demo.answer import Demo
from shortcutflow.demo.page import CSS, build_page

NEEDED = {
    "GET": re.compile(
        r"/|/config|/theme\.css|/favicon\.ico|/(assets|static)/[\w@.+-]+(/[\w@.+-]+)*"
        r"|/gradio_api/(queue/data|heartbeat/\w+|startup-events|theme\.css|info)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel)"),
}
"""All that the page needs. Gradio has many more routes: files, uploads, proxies, an editor of the page's code."""
MOST_BYTES = 2**16
"""Of a request: a page's settings take less than one hundredth."""
HEADERS = {
    # Gradio's page writes scripts and styles into itself, and compiles templates.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; base-uri 'self'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class OnlyThePage:
    """ASGI middleware that lets through what the page needs and forbids the browser to load anything from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            refused = _refused(scope)
            if refused is not None:
                await PlainTextResponse(*refused)(scope, receive, send)
                return
        elif scope["type"] != "lifespan":  # no websockets
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _refused(scope: Scope) -> tuple[str, int] | None:
    """A sentence and a status for what the page does not need."""
    needed = NEEDED.get(scope["method"])
    if needed is None or not needed.fullmatch(scope["path"]) or ".." in scope["path"].split("/"):
        return "This server has the demo's page and nothing else.", 404
    if scope["method"] == "POST":
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdecimal():
            return "A request must say how long it is.", 411
        if int(length) > MOST_BYTES:
            return f"A request may have {MOST_BYTES} bytes.", 413
    return None


def application(demo: Demo) -> FastAPI:
    """The page as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    system = ["system-ui", "sans-serif"]
    gr.mount_gradio_app(
        app, build_page(demo), path="/", footer_links=[], run_history=False, show_error=False, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, max_file_size=1, allowed_paths=[],
        blocked_paths=[Path("/").resolve().anchor], css=CSS,
        theme=gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    app.add_middleware(OnlyThePage)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free.

    Raises:
        ValueError: if it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the demo cannot listen at {host}, port {port}: {reason}; give another --port or --host"
        ) from error


def server_of(demo: Demo) -> uvicorn.Server:
    """The server; ``run(sockets=[listen(...)])`` serves until Ctrl-C, or until its ``should_exit`` is set."""
    # An open page keeps a connection; without a limit Ctrl-C would wait for it.
    config = uvicorn.Config(application(demo), log_level="warning", timeout_graceful_shutdown=1, ws="none")
    return uvicorn.Server(config)
