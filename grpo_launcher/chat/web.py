"""The side by side in a browser, on 127.0.0.1 alone; asks no other host for anything."""

import contextlib
import socket
from pathlib import Path

import fastapi
import gradio as gr
import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from grpo_launcher.chat.checkpoints import CheckpointError, Manner
from grpo_launcher.chat.page import Page

HOST = "127.0.0.1"
# Gradio's files name fonts and services elsewhere; the browser is told to fetch none. Its components compile their templates: unsafe-eval.
ONLY_HERE = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'none'; base-uri 'self'"


def serve(columns: list, rewards, manner: Manner, run: Path | None, port: int | None = None) -> None:
    """Show the page until Ctrl-C. Raises CheckpointError where the port cannot be had; None takes a free one."""
    page = Page(columns, rewards, manner, run)
    app = fastapi.FastAPI(openapi_url=None)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port or 0))
        except (OSError, OverflowError) as error:
            raise CheckpointError(f"--port {port}: {HOST}:{port} cannot be had: {error}. Name another, or none for a free one.") from None
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        css = Path(__file__).with_name("page.css")
        gr.mount_gradio_app(app, page.blocks(), "/", footer_links=[], run_history=False, ssr_mode=False, theme=theme, css_paths=css)
        config = uvicorn.Config(_only_here(app), log_level="warning", timeout_graceful_shutdown=1)
        listener.listen()
        print(f"Open {address} (Ctrl-C ends it). Blind votes go to {page.votes}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    for stop in page.stops.values():
        stop.set()
    print("Ended.", flush=True)


def _only_here(app):
    """The app, for whoever calls it by this machine's name alone, with orders to the browser to ask nobody else."""

    async def answer(scope, receive, send):
        async def ordered(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", ONLY_HERE.encode())]
            await send(message)

        await app(scope, receive, ordered)

    return TrustedHostMiddleware(answer, allowed_hosts=[HOST, "localhost"])
