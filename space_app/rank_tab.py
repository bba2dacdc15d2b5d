"""The tab "Rank": its two columns, and what happens between them."""

import tempfile
from collections.abc import Iterator
from typing import Any

import gradio as gr

from space_app import evaluation, ranking, share, views
from space_app.handlers import QUICK, StopButton, refusing, shown
from space_app.limits import Limits, RefusedError
from space_app.models import Models
from space_app.rank_inputs import RankInputs
from space_app.rank_outputs import RankOutputs

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
            inputs = RankInputs(models, limits)
            with inputs.buttons:
                go = gr.Button("Rank", variant="primary", scale=3, min_width=120, elem_id="rank")
                stop = StopButton("stop")
        with gr.Column(scale=7, min_width=300):
            outputs = RankOutputs(models, limits)
    connect(page, RankHandlers(inputs, outputs, stop), chips, go)


class RankHandlers:
    """What the events of this tab run. Each yields {component: value}."""

    def __init__(self, inputs: RankInputs, outputs: RankOutputs, stop: StopButton):
        self.inputs, self.outputs, self.stop = inputs, outputs, stop
        self.models, self.limits = inputs.models, inputs.limits

    def rank(self, *given) -> Iterator[dict]:
        out = self.outputs
        yield {out.results: views.progress(0, "Reading"), out.found: None}
        steps = ranking.rank(self.models, self.limits, self.inputs.request(*given))
        ranked = yield from shown(steps, "Reading", out.results)
        with tempfile.TemporaryDirectory() as folder:
            yield out.filled(ranked, folder)

    def restore(self, fragment) -> Iterator[dict]:
        shared = share.unpack_link(fragment, self.limits)
        if shared is None:
            yield {self.inputs.query: gr.skip()}
            return
        given = self.inputs.of_link(shared)
        yield dict(zip(self.inputs.given, given, strict=True))
        yield from self.rank(*given)

    def ask(self, count: int, event: gr.EventData) -> tuple:
        """Which document's button was pressed. Only the first step of a chain is told."""
        return event._data, *self.stop.one_more(count)

    def explain(self, ranked, asked: dict) -> Iterator[dict]:
        results = self.outputs.results
        if not isinstance(ranked, ranking.Ranking):
            raise RefusedError("This ranking is no longer held here: rank again.")
        index = asked.get("index")
        if not isinstance(index, int):
            raise RefusedError("There is no such document.")
        if asked.get("close"):
            yield {results: views.ranking(ranked)}
            return
        yield {results: views.ranking(ranked, explaining=index)}
        steps = ranking.explain(self.models, self.limits, ranked.request, index)
        explained = None
        while explained is None:
            try:
                next(steps)
            except StopIteration as end:
                explained = end.value
            else:
                yield {results: gr.skip()}
        yield {results: views.ranking(ranked, explained)}

    def compare(self, left, right, *given) -> Iterator[dict]:
        where = self.outputs.side_by_side
        yield {where: views.progress(0, "Reading with both")}
        steps = ranking.compare(self.models, self.limits, self.inputs.request(*given), left, right)
        compared = yield from shown(steps, "Reading with both", where)
        yield {where: views.comparison(compared)}

    def read_files(self, paths, *choice) -> Iterator[dict]:
        """Other documents: the ranking of the former ones goes."""
        for values in self.inputs.read_files(paths, *choice):
            yield values | self.outputs.cleared() if self.inputs.text in values else values


def connect(page: gr.Blocks, handlers: RankHandlers, chips: gr.Dataset, go: gr.Button) -> None:
    inputs, outputs, stop = handlers.inputs, handlers.outputs, handlers.stop
    results, given, filled = outputs.results, inputs.given, outputs.components
    options: dict[str, Any] = {"concurrency_id": "rank", "concurrency_limit": 2, "api_visibility": "private"}
    rank = refusing(results, handlers.rank)
    examples = evaluation.examples()
    ranked = stop.begin(go.click, inputs.query.submit).then(rank, given, filled, show_progress_on=results, **options)
    chosen = (
        stop.begin(chips.click)
        .then(lambda number: inputs.of_example(examples[number]), chips, given[:-1], **QUICK)
        .then(rank, given, filled, show_progress_on=results, **options)
    )
    restored = stop.begin(page.load).then(
        refusing(results, handlers.restore),
        outputs.sent,
        [*given, *filled],
        js="() => location.hash",
        show_progress="hidden",
        **options,
    )
    asked = gr.State()
    explained = results.click(handlers.ask, stop.running, [asked, stop.running, stop.button], **QUICK).then(
        refusing(results, handlers.explain), [outputs.found, asked], results, show_progress="hidden", **options
    )
    compared = stop.begin(outputs.compare.click).then(
        refusing(outputs.side_by_side, handlers.compare),
        [outputs.left, outputs.right, *given],
        outputs.side_by_side,
        **options,
    )
    stop.until(ranked, chosen, restored, explained, compared)
    stop.stops(results, outputs.side_by_side)
    for event in (ranked, chosen, restored):
        event.then(None, outputs.sent, outputs.link, js=LINK, api_visibility="private")
    connect_inputs(page, handlers)


def connect_inputs(page: gr.Blocks, handlers: RankHandlers) -> None:
    inputs, outputs = handlers.inputs, handlers.outputs
    gr.on([page.load, inputs.model.change], inputs.offer_instruction, inputs.model, inputs.instruction, **QUICK)
    options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4, "show_progress": "hidden"}
    read = refusing(inputs.file_note, handlers.read_files)
    changed = [inputs.text, inputs.parting, inputs.column, inputs.file_note, *outputs.components]
    for listen, given in (
        (inputs.file.change, [inputs.file, inputs.parting]),
        (inputs.column.input, [inputs.file, inputs.parting, inputs.column]),
    ):
        listen(read, given, changed, **options).then(None, outputs.sent, outputs.link, js=LINK, **QUICK)
