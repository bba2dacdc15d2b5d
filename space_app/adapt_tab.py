"""The tab "Adapt": the command and, where it is enabled, a small run of it."""

from typing import Any

import gradio as gr

from space_app import adaptation, views
from space_app.handlers import refusing
from space_app.inputs import DOCUMENT_FILES, read_table
from space_app.limits import Limits, RefusedError
from space_app.models import Models

ADAPT_WORDS = (
    "A reranker can learn your own documents without labels: queries are written from them, a teacher scores "
    "candidates, the model trains on these scores and is merged with what it was. Documents held "
    "aside say whether it is better."
)


def add_adapt_tab(models: Models, limits: Limits) -> None:
    minutes = adaptation.allowed_minutes()
    gr.HTML(views.note(ADAPT_WORDS), apply_default_css=False)
    gr.Code(
        adaptation.command("querit/querit-reranker-nano"),
        language="shell",
        label="On your own machine",
        interactive=False,
    )
    if not minutes:
        gr.HTML(views.note("Whoever runs this page has not enabled adapting here."), apply_default_css=False)
        return
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            file = gr.File(
                label="Documents", file_types=list(DOCUMENT_FILES), type="filepath", height=140, elem_id="adapt-file"
            )
            model = gr.Dropdown(models.names, value=models.names[0], label="Model to adapt", elem_id="adapt-model")
            budget = gr.Slider(1, max(minutes, 1), value=minutes, step=1, label="Minutes", elem_id="adapt-minutes")
            with gr.Row():
                go = gr.Button("Adapt", variant="primary", scale=3, min_width=120, elem_id="adapt")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="adapt-stop")
        with gr.Column(scale=7, min_width=300):
            outcome = gr.HTML(
                '<div class="q-empty">The verdict appears here.</div>', apply_default_css=False, elem_id="adapt-outcome"
            )
            archive = gr.DownloadButton("Download the adapted model", visible=False, elem_id="adapt-archive")

    def run(path, name, minutes):
        if not path:
            raise RefusedError("Drop a file of documents first: some hundreds of them.")
        table = read_table(path, "line", limits)
        for step in adaptation.adapt(models, table.documents(table.likely_column), name, minutes):
            if isinstance(step, adaptation.Progress):
                yield {outcome: views.adapting(step)}
            else:
                yield {outcome: views.adapted(step), archive: gr.DownloadButton(value=str(step.archive), visible=True)}

    options: dict[str, Any] = {"concurrency_id": "adapt", "concurrency_limit": 1, "api_visibility": "private"}
    started = go.click(refusing(outcome, run), [file, model, budget], [outcome, archive], **options)
    stop.click(lambda: views.note("Stopped."), None, outcome, cancels=started, api_visibility="private", queue=False)
