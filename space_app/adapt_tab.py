"""The tab "Adapt": the command and, where it is enabled, a small run of it."""

from typing import Any

import gradio as gr

from space_app import adaptation, views
from space_app.handlers import GO_TO_NEWS, StopButton, refusing
from space_app.inputs import DOCUMENT_FILES, read_table
from space_app.limits import Limits, RefusedError
from space_app.models import Models

ADAPT_WORDS = (
    "A reranker can learn your own documents without labels: queries are written from them, a teacher scores "
    "candidates for each query, and the model trains on these scores and is merged with what it was before. Documents "
    "held aside tell whether it became better."
)


def add_adapt_tab(models: Models, limits: Limits) -> None:
    minutes = adaptation.allowed_minutes()
    gr.HTML(views.note(ADAPT_WORDS), apply_default_css=False)
    gr.Code(
        adaptation.command("querit/querit-reranker-nano"),
        language="shell",
        wrap_lines=True,
        label="On your own machine",
        interactive=False,
    )
    if minutes:
        AdaptForm(models, limits, minutes)
    else:
        words = "Here in the browser it is turned off. Whoever runs this page can turn it on with:"
        gr.HTML(views.note(words), apply_default_css=False)
        gr.Code(adaptation.HOW_TO_ENABLE, language="shell", wrap_lines=True, label="To turn it on", interactive=False)


class AdaptForm:
    """What a visitor gives, and the verdict beside it."""

    def __init__(self, models: Models, limits: Limits, minutes: float):
        self.models, self.limits = models, limits
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                file = gr.File(
                    label="Documents",
                    file_types=list(DOCUMENT_FILES),
                    type="filepath",
                    height=140,
                    elem_id="adapt-file",
                )
                model = gr.Dropdown(models.names, value=models.names[0], label="Model to adapt", elem_id="adapt-model")
                budget = gr.Slider(1, max(minutes, 1), value=minutes, step=1, label="Minutes", elem_id="adapt-minutes")
                with gr.Row():
                    go = gr.Button("Adapt", variant="primary", scale=3, min_width=120, elem_id="adapt")
                    stop = StopButton("adapt-stop")
            with gr.Column(scale=7, min_width=300):
                self.outcome = gr.HTML(
                    '<div class="q-empty">The verdict appears here.</div>',
                    apply_default_css=False,
                    js_on_load=GO_TO_NEWS,
                    elem_id="adapt-outcome",
                )
                self.archive = gr.DownloadButton("Download the adapted model", visible=False, elem_id="adapt-archive")
        options: dict[str, Any] = {"concurrency_id": "adapt", "concurrency_limit": 1, "api_visibility": "private"}
        run = refusing(self.outcome, self.run)
        stop.until(stop.begin(go.click).then(run, [file, model, budget], [self.outcome, self.archive], **options))
        stop.stops(self.outcome)

    def run(self, path, name, minutes):
        if not path:
            raise RefusedError("Drop a file of documents first: it takes some hundreds of them.")
        yield {self.archive: gr.DownloadButton(visible=False)}
        table = read_table(path, "line", self.limits)
        for step in adaptation.adapt(self.models, table.documents(table.likely_column), name, minutes):
            if isinstance(step, adaptation.Progress):
                yield {self.outcome: views.adapting(step)}
            else:
                archive = gr.DownloadButton(value=str(step.archive), visible=True)
                yield {self.outcome: views.adapted(step), self.archive: archive}
