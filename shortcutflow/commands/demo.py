"""The command that opens a page to play with a run: demo."""

from __future__ import annotations

import os
import tempfile
import webbrowser
from contextlib import suppress
from typing import Annotated

import typer

from shortcutflow.commands.options import Device, Place, Weights


def demo_command(
    run: Place,
    beside: Annotated[str | None, typer.Option(help="A second run or model, sampled from the same noise.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Open a page to sample a run: any number of steps, seed and class, the path from noise, a second run beside it."""
    with tempfile.TemporaryDirectory(prefix="shortcutflow-demo-") as folder:
        # Gradio makes a folder when it is loaded, by default one that all users of the machine share.
        os.environ["GRADIO_TEMP_DIR"] = folder
        from shortcutflow.demo.answer import Demo
        from shortcutflow.demo.server import listen, server_of
        from shortcutflow.distributed import Rank

        with listen(host, port) as listening:
            places = [run] if beside is None else [run, beside]
            demo = Demo.open(*places, weights=weights, device=Rank().device(device))
            shown = "localhost" if host in ("0.0.0.0", "::") else host
            url = f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}"
            print(f"{url}  {' beside '.join(map(str, demo.models))}  (Ctrl-C stops it)", flush=True)
            if open_browser:
                webbrowser.open(url)
            with suppress(KeyboardInterrupt):
                server_of(demo).run(sockets=[listening])
