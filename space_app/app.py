"""The page: `querit demo`, or `python app.py` as a Hugging Face Space does."""

import contextlib
import os
import socket
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware

from space_app import views
from space_app.about import add_about_tab
from space_app.adapt_tab import add_adapt_tab
from space_app.api import add_endpoints
from space_app.body_limit import BodyLimit
from space_app.evaluate_tab import add_evaluate_tab
from space_app.limits import Limits
from space_app.look import theme
from space_app.models import Models, configured
from space_app.rank_tab import add_rank_tab

LOOPBACK = "127.0.0.1"
PORTS = range(7860, 7960)  # tried in this order where none is named


def build(models: Models, limits: Limits) -> gr.Blocks:
    with gr.Blocks(title="Querit Reranker", delete_cache=(600, 3600)) as page:
        add_endpoints(models, limits)  # first: they get the names, and the page's own handlers what is left
        gr.HTML(views.header(), apply_default_css=False)
        with gr.Tabs():
            with gr.Tab("Rank"):
                add_rank_tab(page, models, limits)
            with gr.Tab("Evaluate"):
                add_evaluate_tab(models, limits)
            with gr.Tab("Adapt"):
                add_adapt_tab(models, limits)
            with gr.Tab("About"):
                add_about_tab(models, limits)
    return page


# On a phone gradio leaves out the link to the API, and not the dot after it. Of a style sheet's media queries it keeps
# what is about the page's inside alone.
HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<style>@media (max-width: 640px) { footer > div { display: none; } }</style>"""


def web_app(models: Models, limits: Limits) -> FastAPI:
    page = build(models, limits)
    page.queue(max_size=200, status_update_rate=1)
    page.state_session_capacity = 500
    # Characters of four bytes, escaped in JSON, take three times as many.
    most_bytes = 6 * limits.text + limits.file_bytes
    return gr.mount_gradio_app(
        FastAPI(middleware=[Middleware(BodyLimit, most_bytes=most_bytes)]),
        page,
        path="/",
        show_error=False,
        theme=theme(),
        css_paths=Path(views.__file__).parent / "style.css",
        head=HEAD,
        footer_links=["api", "settings"],
        run_history=False,
        max_file_size=limits.file_bytes,
        enable_monitoring=False,
        ssr_mode=False,
    )


def listen(host: str | None, port: int | None) -> socket.socket:
    """A socket that accepts connections already: who comes before the server is up waits, and is not turned away.

    Raises OSError where the address cannot be had.
    """
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOOPBACK
    if port is None and (named := os.environ.get("GRADIO_SERVER_PORT")):
        port = int(named)
    for candidate in PORTS if port is None else (port,):
        try:
            return socket.create_server((host, candidate), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            reason = error.strerror
    tried = f"any port from {PORTS[0]} to {PORTS[-1]}" if port is None else f"port {port}"
    raise OSError(f"The page cannot be served at {host} on {tried} ({reason}). Choose another with --port.")


def address_of(opened: socket.socket) -> str:
    host, port = opened.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - every address of this machine; a browser here opens this one
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def server_of(models: Models, limits: Limits) -> uvicorn.Server:
    """To be run on what `listen` gave. Gradio's own launch gives up where a busy machine takes seconds to answer."""
    config = uvicorn.Config(web_app(models, limits), log_level="warning", timeout_graceful_shutdown=1)
    return uvicorn.Server(config)


def start(sources: dict[str, str], host: str | None = None, port: int | None = None) -> None:
    """Serve the page until Ctrl+C. Raises ValueError for a source that is none, OSError for an address taken."""
    with listen(host, port) as opened:
        models = Models(sources, at_home=opened.getsockname()[0] in (LOOPBACK, "::1"))
        server = server_of(models, Limits())
        models.warm_up()
        print(f"Open {address_of(opened)} in a browser; Ctrl+C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[opened])


if __name__ == "__main__":
    start(configured())
