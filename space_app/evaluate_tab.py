"""The tab "Evaluate": a small judged set in, nDCG@10 before and after reranking out."""

from typing import Any

import gradio as gr

from space_app import evaluation, views
from space_app.handlers import GO_TO_NEWS, StopButton, refusing, shown
from space_app.inputs import JUDGED_FILES, read_judged
from space_app.limits import Limits, RefusedError
from space_app.models import Models
from space_app.rank_inputs import READING

JUDGED_WORDS = (
    "A small judged set: a BEIR folder as .zip (corpus.jsonl, queries.jsonl, qrels/test.tsv), or .jsonl with lines of "
    '{"query": "...", "positive": ["..."], "negative": ["..."]}. BM25 ranks, the model reranks what BM25 found.'
)


def add_evaluate_tab(models: Models, limits: Limits) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            gr.HTML(views.note(JUDGED_WORDS), apply_default_css=False)
            file = gr.File(
                label=f"{', '.join(JUDGED_FILES)}, up to {limits.file_bytes / 1e6:g} MB",
                file_types=list(JUDGED_FILES),
                type="filepath",
                height=140,
                elem_id="judged-file",
            )
            model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="judged-model")
            reading = gr.Radio(READING, value="truncate", label="Long documents", elem_id="judged-reading")
            with gr.Row():
                go = gr.Button("Evaluate", variant="primary", scale=3, min_width=120, elem_id="evaluate")
                stop = StopButton("evaluate-stop")
            try_examples = gr.Button("Try it with this page's examples", elem_id="evaluate-examples")
        with gr.Column(scale=7, min_width=300):
            outcome = gr.HTML(
                '<div class="q-empty">nDCG@10 before and after reranking appears here.</div>',
                apply_default_css=False,
                js_on_load=GO_TO_NEWS,
                elem_id="outcome",
            )

    def evaluate(path, name, long_documents):
        if not path:
            raise RefusedError("Drop a judged set first, or try it with this page's examples.")
        yield {outcome: views.progress(0, "Reading the set")}
        yield from measure(read_judged(path, limits), name, long_documents)

    def evaluate_examples(name, long_documents):
        yield from measure(evaluation.set_of_examples(), name, long_documents, own_examples=True)

    def measure(judged, name, long_documents, own_examples=False):
        steps = evaluation.evaluate(models, limits, judged, name, long_documents)
        found = yield from shown(steps, "Reranking the candidates of every query", outcome)
        yield {outcome: views.evaluation(found, own_examples)}

    options: dict[str, Any] = {"concurrency_id": "evaluate", "concurrency_limit": 1, "api_visibility": "private"}
    stop.until(
        stop.begin(go.click).then(refusing(outcome, evaluate), [file, model, reading], outcome, **options),
        stop.begin(try_examples.click).then(refusing(outcome, evaluate_examples), [model, reading], outcome, **options),
    )
    stop.stops(outcome)
