"""The tab "Rank": inputs on the left; on the right the ranking, two orders side by side, and what to take away."""

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from space_app import evaluation, ranking, share, views
from space_app.handlers import refusing, said
from space_app.inputs import DOCUMENT_FILES, TABLES, join_documents, read_table, split_documents
from space_app.limits import Limits, RefusedError, check_documents
from space_app.models import Models

INSTRUCTIONS = [
    "Find the passage that answers the question.",
    "Find texts about the same subject, whether they answer or not.",
    "Find the same question asked in other words.",
    "Find the instructions that solve the problem.",
    "Find what speaks against the claim.",
]
READING = [("Read their beginning", "truncate"), ("Read all; the best passage counts", "max_passage")]
PARTING = [("a line", "line"), ("a paragraph", "paragraph"), ("parted by %%%", "section")]
EMPTY = (
    '<div class="q-empty">Choose an example, or type a query and paste documents.<br>The ranking appears here.</div>'
)
EMPTY_SIDES = '<div class="q-empty">Two orders of the same documents appear here.</div>'
# Buttons in the ranking name a document; in the comparison, a document pointed at is shown on both sides.
ON_RANKING = """
element.addEventListener('click', event => {
  const button = event.target.closest('.q-why');
  if (button) trigger('click', {index: Number(button.dataset.index), close: Boolean(button.dataset.close)});
});
watch('value', () => {
  element.querySelector('[data-focus]')?.focus({preventScroll: true});
  const below = element.getBoundingClientRect().top > innerHeight * 0.85;
  if (below && element.querySelector('.q-progress, .q-error')) element.scrollIntoView({block: 'start'});
});
"""
ON_COMPARISON = """
const show = event => {
  const cell = event.target.closest?.('.q-cell');
  element.querySelectorAll('.q-cell').forEach(other =>
    other.classList.toggle('q-same-doc', Boolean(cell) && other.dataset.doc === cell.dataset.doc));
};
for (const kind of ['mouseover', 'focusin', 'mouseleave', 'focusout']) element.addEventListener(kind, show);
"""
LINK = "fragment => fragment ? location.origin + location.pathname + '#' + fragment : ''"


def add_rank_tab(page: gr.Blocks, models: Models, limits: Limits) -> None:
    examples = evaluation.examples()
    chips = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[example["query"]] for example in examples],
        sample_labels=[example["name"] for example in examples],
        label="Examples",
        type="index",
        samples_per_page=len(examples),
        elem_id="examples",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            query = gr.Textbox(
                label="Query", placeholder="What are you looking for?", lines=1, max_lines=4, elem_id="query"
            )
            text = gr.Textbox(
                label="Documents",
                placeholder="Paste one document a line, or drop a file below.",
                lines=9,
                max_lines=16,
                elem_id="documents",
            )
            parting = gr.Radio(PARTING, value="line", label="A document is", elem_id="parting")
            with gr.Row():
                go = gr.Button("Rank", variant="primary", scale=3, min_width=120, elem_id="rank")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
            with gr.Accordion("Documents from a file", open=False, elem_id="from-file"):
                file = gr.File(
                    label=f"{', '.join(DOCUMENT_FILES)}, at most {limits.file_bytes / 1e6:g} MB",
                    file_types=list(DOCUMENT_FILES),
                    type="filepath",
                    height=150,
                    elem_id="file",
                )
                column = gr.Dropdown([], label="Column that holds the text", visible=False, elem_id="column")
                file_note = gr.HTML(apply_default_css=False)
            with gr.Accordion("Options", open=False, elem_id="options"):
                model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="model")
                instruction = gr.Dropdown(
                    ["", *INSTRUCTIONS],
                    value="",
                    allow_custom_value=True,
                    label="Instruction",
                    info="What relevance means here: pick one, type your own, or leave it empty.",
                    elem_id="instruction",
                )
                reading = gr.Radio(READING, value="truncate", label="Long documents", elem_id="reading")
        with gr.Column(scale=7, min_width=300), gr.Tabs():
            with gr.Tab("Ranking"):
                results = gr.HTML(EMPTY, apply_default_css=False, js_on_load=ON_RANKING, elem_id="results")
            with gr.Tab("Compare"):
                with gr.Row(equal_height=True):
                    sides = [ranking.BM25, *models.names]
                    left = gr.Dropdown(sides, value=sides[0], label="Left", min_width=110, elem_id="left")
                    right = gr.Dropdown(sides, value=sides[-1], label="Right", min_width=110, elem_id="right")
                    compare = gr.Button("Compare", scale=0, min_width=110, elem_id="compare")
                side_by_side = gr.HTML(
                    EMPTY_SIDES, apply_default_css=False, js_on_load=ON_COMPARISON, elem_id="side-by-side"
                )
            with gr.Tab("Share"):
                link = gr.Textbox(
                    label="Link to this ranking", interactive=False, max_lines=1, buttons=["copy"], elem_id="link"
                )
                with gr.Row():
                    as_csv = gr.DownloadButton("Download CSV", interactive=False, elem_id="csv")
                    as_json = gr.DownloadButton("Download JSON", interactive=False, elem_id="json")
                python = gr.Code(label="Use this in Python", language="python", interactive=False, elem_id="python")
                take_note = gr.HTML(views.note("Rank something first."), apply_default_css=False)
    found = gr.State(time_to_live=3600)
    sent = gr.Textbox(visible=False)  # the link's last part
    inputs = [query, text, parting, instruction, reading, model]

    def request(asked, pasted, separator, *rest) -> ranking.Request:
        return ranking.make_request(models, limits, asked, split_documents(pasted, separator), *rest)

    def rank(*given):
        yield {results: views.progress(0, "Reading"), found: None}
        ranked = yield from said(ranking.rank(models, limits, request(*given)), "Reading", results)
        try:
            packed, words = share.pack(ranked.request, limits), ""
        except RefusedError as error:
            packed, words = "", str(error)
        with tempfile.TemporaryDirectory() as folder:  # gradio copies the files when they are yielded
            files = {"ranking.csv": share.as_csv(ranked), "ranking.json": share.as_json(ranked)}
            for name, content in files.items():
                Path(folder, name).write_text(content, encoding="utf-8", newline="")
            yield {
                results: views.ranking(ranked),
                found: ranked,
                side_by_side: views.comparison(ranking.first_stage_beside(ranked)),
                left: ranking.BM25,
                right: ranked.request.model,
                take_note: views.note(words) if words else "",
                sent: packed,
                python: share.as_python(ranked, models),
                as_csv: gr.DownloadButton(value=str(Path(folder, "ranking.csv")), interactive=True),
                as_json: gr.DownloadButton(value=str(Path(folder, "ranking.json")), interactive=True),
            }

    def explain(ranked, event: gr.EventData):
        if not isinstance(ranked, ranking.Ranking):
            raise RefusedError("This ranking is no longer held here: rank again.")
        index, close = event._data.get("index"), event._data.get("close")
        if not isinstance(index, int):
            raise RefusedError("There is no such document.")
        if close:
            yield {results: views.ranking(ranked)}
            return
        yield {results: views.ranking(ranked, explaining=index)}
        steps = ranking.explain(models, limits, ranked.request, index)
        explained = None
        while explained is None:
            try:
                next(steps)
            except StopIteration as end:
                explained = end.value
            else:
                yield {results: gr.skip()}
        yield {results: views.ranking(ranked, explained)}

    def compare_models(left_name, right_name, *given):
        yield {side_by_side: views.progress(0, "Reading with both")}
        steps = ranking.compare(models, limits, request(*given), left_name, right_name)
        compared = yield from said(steps, "Reading with both", side_by_side)
        yield {side_by_side: views.comparison(compared)}

    def read(path, separator, chosen=None):
        if not path:
            yield {file_note: "", column: gr.Dropdown(visible=False)}
            return
        yield {column: gr.Dropdown(visible=False)}
        table = read_table(path, separator, limits)
        name = chosen if chosen in table.columns else table.likely_column
        documents = check_documents(table.documents(name), limits)
        joined, parted = join_documents(documents)
        yield {
            text: joined,
            parting: parted,
            column: gr.Dropdown(
                table.columns, value=name, visible=Path(path).suffix.lower() in TABLES and len(table.columns) > 1
            ),
            file_note: views.note(f"{len(documents):,} documents are now in the box above; you can edit them there."),
        }

    def choose(number):
        example = examples[number]
        joined, separator = join_documents(example["documents"])
        return example["query"], joined, separator, "", example.get("long_documents", "truncate")

    def restore(fragment):
        shared = share.unpack_link(fragment, limits)
        if shared is None:
            yield {query: gr.skip()}
            return
        joined, separator = join_documents(shared.documents)
        given = (shared.query, joined, separator, shared.instruction, shared.long_documents)
        name = shared.model if shared.model in models.sources else models.names[0]
        yield dict(zip(inputs, (*given, name), strict=True))
        yield from rank(*given, name)

    outputs = [results, found, side_by_side, left, right, take_note, sent, python, as_csv, as_json]
    options: dict[str, Any] = {"concurrency_id": "rank", "concurrency_limit": 2, "api_visibility": "private"}
    quick: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    ranked = gr.on(
        [go.click, query.submit], refusing(results, rank), inputs, outputs, show_progress_on=results, **options
    )
    chosen = chips.click(choose, chips, [query, text, parting, instruction, reading], **quick).then(
        refusing(results, rank), inputs, outputs, show_progress_on=results, **options
    )
    restored = page.load(
        refusing(results, restore),
        sent,
        [*inputs, *outputs],
        js="() => location.hash",
        show_progress="hidden",
        **options,
    )
    for event in (ranked, chosen, restored):
        event.then(None, sent, link, js=LINK, api_visibility="private")
    explained = results.click(refusing(results, explain), found, results, show_progress="hidden", **options)
    compared = compare.click(refusing(side_by_side, compare_models), [left, right, *inputs], side_by_side, **options)
    stop.click(
        lambda: [views.note("Stopped.")] * 2,
        None,
        [results, side_by_side],
        cancels=[ranked, chosen, restored, explained, compared],
        **quick,
    )
    reading_file: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4, "show_progress": "hidden"}
    file.change(refusing(file_note, read), [file, parting], [text, parting, column, file_note], **reading_file)
    column.input(refusing(file_note, read), [file, parting, column], [text, parting, column, file_note], **reading_file)
