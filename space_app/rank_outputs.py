"""The right column of the tab "Rank": the ranking, two orders side by side, and what to take away."""

from pathlib import Path
from typing import Any

import gradio as gr

from space_app import ranking, share, views
from space_app.handlers import GO_TO_NEWS
from space_app.limits import Limits, RefusedError
from space_app.models import Models

EMPTY = (
    '<div class="q-empty">Choose an example, or type a query and paste documents.<br>The ranking appears here.</div>'
)
EMPTY_SIDES = '<div class="q-empty">Two orders of the same documents appear here.</div>'
NOTHING_YET = "Rank something first."
# Buttons in the ranking name a document.
ON_RANKING = (
    GO_TO_NEWS
    + """
element.addEventListener('click', event => {
  const button = event.target.closest('.q-why');
  if (button) trigger('click', {index: Number(button.dataset.index), close: Boolean(button.dataset.close)});
});
watch('value', () => element.querySelector('[data-focus]')?.focus({preventScroll: true}));
"""
)
# The document that is pointed at, tapped or focused is shown on both sides.
ON_COMPARISON = """
const show = event => {
  const cell = event.target.closest?.('.q-cell');
  element.querySelectorAll('.q-cell').forEach(other =>
    other.classList.toggle('q-same-doc', Boolean(cell) && other.dataset.doc === cell.dataset.doc));
};
for (const kind of ['mouseover', 'focusin', 'mouseleave', 'focusout']) element.addEventListener(kind, show);
"""


class RankOutputs:
    """Made within a column. `components` are those that a new ranking fills."""

    def __init__(self, models: Models, limits: Limits):
        self.models, self.limits = models, limits
        with gr.Tabs():
            with gr.Tab("Ranking"):
                self.results = gr.HTML(EMPTY, apply_default_css=False, js_on_load=ON_RANKING, elem_id="results")
            with gr.Tab("Compare"):
                self._add_comparison()
            with gr.Tab("Share"):
                self._add_share()
        self.found = gr.State(time_to_live=3600)
        self.sent = gr.Textbox(visible=False)  # the link's last part
        self.components = [
            self.results, self.found, self.side_by_side, self.left, self.right, self.take_note, self.sent, self.python,
            self.as_csv, self.as_json,
        ]  # fmt: skip

    def _add_comparison(self) -> None:
        sides = [ranking.BM25, *self.models.names]
        with gr.Row(equal_height=True):
            self.left = gr.Dropdown(sides, value=sides[0], label="Left", min_width=110, elem_id="left")
            self.right = gr.Dropdown(sides, value=sides[-1], label="Right", min_width=110, elem_id="right")
            self.compare = gr.Button("Compare", scale=0, min_width=110, elem_id="compare")
        self.side_by_side = gr.HTML(
            EMPTY_SIDES, apply_default_css=False, js_on_load=ON_COMPARISON, elem_id="side-by-side"
        )

    def _add_share(self) -> None:
        self.take_note = gr.HTML(views.note(NOTHING_YET), apply_default_css=False)
        self.link = gr.Textbox(
            label="Link to this ranking", interactive=False, max_lines=1, buttons=["copy"], elem_id="link"
        )
        with gr.Row():
            self.as_csv = gr.DownloadButton("Save CSV", interactive=False, elem_id="csv")
            self.as_json = gr.DownloadButton("Save JSON", interactive=False, elem_id="json")
        self.python = gr.Code(label="Use this in Python", language="python", interactive=False, elem_id="python")

    def cleared(self) -> dict[Any, Any]:
        """As before the first ranking."""
        return {
            self.results: EMPTY,
            self.found: None,
            self.side_by_side: EMPTY_SIDES,
            self.take_note: views.note(NOTHING_YET),
            self.sent: "",
            self.python: "",
            self.as_csv: gr.DownloadButton(value=None, interactive=False),
            self.as_json: gr.DownloadButton(value=None, interactive=False),
        }

    def filled(self, ranked: ranking.Ranking, folder: str) -> dict[Any, Any]:
        """The folder holds the downloads until gradio has copied them."""
        try:
            packed, words = share.pack(ranked.request, self.limits), ""
        except RefusedError as error:
            packed, words = "", str(error)
        files = {"ranking.csv": share.as_csv(ranked), "ranking.json": share.as_json(ranked)}
        for name, content in files.items():
            Path(folder, name).write_text(content, encoding="utf-8", newline="")
        return {
            self.results: views.ranking(ranked),
            self.found: ranked,
            self.side_by_side: views.comparison(ranking.first_stage_beside(ranked)),
            self.left: ranking.BM25,
            self.right: ranked.request.model,
            self.take_note: views.note(words) if words else "",
            self.sent: packed,
            self.python: share.as_python(ranked, self.models),
            self.as_csv: gr.DownloadButton(value=str(Path(folder, "ranking.csv")), interactive=True),
            self.as_json: gr.DownloadButton(value=str(Path(folder, "ranking.json")), interactive=True),
        }
