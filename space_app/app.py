"""The page: `querit demo`, or `python app.py` as a Hugging Face Space does."""

import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")

import gradio as gr
from starlette.middleware import Middleware

from space_app import views
from space_app.adapt_tab import add_adapt_tab
from space_app.api import add_endpoints
from space_app.body_limit import BodyLimit
from space_app.evaluate_tab import add_evaluate_tab
from space_app.limits import Limits
from space_app.look import theme
from space_app.models import Models, configured
from space_app.rank_tab import add_rank_tab


def build(models: Models, limits: Limits) -> gr.Blocks:
    with gr.Blocks(title="Querit Reranker", delete_cache=(600, 3600)) as page:
        add_endpoints(models, limits)  # first: they get the names, and the page's own handlers what is left
        gr.HTML(views.header(models.names[0]), apply_default_css=False)
        with gr.Tabs():
            with gr.Tab("Rank"):
                add_rank_tab(page, models, limits)
            with gr.Tab("Evaluate"):
                add_evaluate_tab(models, limits)
            with gr.Tab("Adapt"):
                add_adapt_tab(models, limits)
            with gr.Tab("About"):
                gr.HTML(views.about(limits, models.names), apply_default_css=False)
    return page


def start(
    sources: dict[str, str],
    host: str | None = None,
    port: int | None = None,
    wait: bool = True,
    limits: Limits | None = None,
) -> tuple[gr.Blocks, str]:
    """Serve the page. -> the page and its address."""
    limits = limits or Limits()
    models = Models(sources)
    page = build(models, limits)
    models.warm_up()
    page.queue(max_size=200, status_update_rate=1)
    # Characters of four bytes, escaped in JSON, take three times as many.
    most_bytes = 6 * limits.text + limits.file_bytes
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        theme=theme(),
        css_paths=Path(views.__file__).parent / "style.css",
        head='<meta name="viewport" content="width=device-width, initial-scale=1">',
        footer_links=["api", "settings"],
        max_file_size=limits.file_bytes,
        state_session_capacity=500,
        enable_monitoring=False,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(BodyLimit, most_bytes=most_bytes)]},
    )
    if wait:
        print(f"Open {address} in a browser; Ctrl+C ends it.", flush=True)
        page.block_thread()
    return page, address


if __name__ == "__main__":
    start(configured())
