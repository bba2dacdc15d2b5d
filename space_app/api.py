"""The endpoints for programs (`gradio_client`): typed, under the same limits, stopped in the same way."""

import html
from collections.abc import Generator, Iterator
from typing import Any

import gradio as gr

from space_app import evaluation, ranking
from space_app.inputs import read_judged
from space_app.limits import Limits, RefusedError
from space_app.models import Models
from space_app.share import table_rows


def answer(steps: Generator[float, None, Any], empty: Any, result) -> Iterator[Any]:
    """Yield `empty` until all steps are done, then `result` of what they return: the last value is the answer.

    Between two steps gradio can stop it. A message may be shown as HTML by whoever receives it.
    """
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                yield result(end.value)
                return
            yield empty
    except RefusedError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None


class Endpoints:
    """The types of the answers are those of the last value that each of these yields; gradio tells them to programs.

    What may be refused is checked in the first step.
    """

    def __init__(self, models: Models, limits: Limits):
        self.models, self.limits = models, limits

    def request(self, *given) -> ranking.Request:
        return ranking.make_request(self.models, self.limits, *given)

    def rank(  # type: ignore[misc]
        self, query: str, documents: list[str], instruction: str = "", long_documents: str = "truncate", model: str = ""
    ) -> list[dict]:
        """Order documents by how well they answer a query, best first.

        instruction: what relevance means here, for models that take one. long_documents: "truncate" reads the beginning
        of what does not fit, "max_passage" all of it, of which the best passage counts. model: one of /models; the
        first if empty.
        """

        def steps():
            asked = self.request(query, documents, instruction, long_documents, model)
            return (yield from ranking.rank(self.models, self.limits, asked))

        yield from answer(steps(), [], table_rows)

    def explain(  # type: ignore[misc]
        self, query: str, document: str, instruction: str = "", long_documents: str = "truncate", model: str = ""
    ) -> dict:
        """What was read of a document (characters start to end), and what its sentences score by themselves."""

        def steps():
            asked = self.request(query, [document], instruction, long_documents, model)
            return (yield from ranking.explain(self.models, self.limits, asked, 0))

        def result(found: ranking.Explanation) -> dict:
            return {
                "start": found.start,
                "end": found.end,
                "passages": found.windows,
                "sentences": [{"text": text, "probability": p} for text, p in found.sentences],
                "best": found.best,
            }

        yield from answer(steps(), {}, result)

    def compare(  # type: ignore[misc]
        self,
        query: str,
        documents: list[str],
        left: str,
        right: str,
        instruction: str = "",
        long_documents: str = "truncate",
    ) -> dict:
        """Two models on the same documents; left or right may be "BM25", the first stage."""

        def steps():
            model = left if right == ranking.BM25 else right
            asked = self.request(query, documents, instruction, long_documents, "" if model == ranking.BM25 else model)
            return (yield from ranking.compare(self.models, self.limits, asked, left, right))

        def result(found: ranking.Comparison) -> dict:
            sides = zip(("left", "right"), zip(*found.rows, strict=True), strict=True)
            orders = {
                side: [{"index": c.index, "probability": c.probability, "change": c.change} for c in cells]
                for side, cells in sides
            }
            return {**orders, "agreement": found.agreement}

        yield from answer(steps(), {}, result)

    def evaluate(self, file: str, model: str = "", long_documents: str = "") -> Iterator[dict]:
        def steps():
            if not file:
                raise RefusedError("Give a judged set: a BEIR folder as .zip, or .jsonl.")
            judged = read_judged(file, self.limits)
            reading = long_documents or "truncate"
            return (yield from evaluation.evaluate(self.models, self.limits, judged, model, reading))

        def result(found: evaluation.Evaluation) -> dict:
            return {
                "model": found.model,
                "before": found.before,
                "after": found.after,
                "queries": [{"query": o.query, "before": o.before, "after": o.after} for o in found.outcomes],
            }

        yield from answer(steps(), {}, result)

    def list_models(self) -> list[str]:
        """The models that can be chosen; the first is the default."""
        return self.models.names


def add_endpoints(models: Models, limits: Limits) -> None:
    """Within a `gr.Blocks`."""
    endpoints = Endpoints(models, limits)
    ranking_options: dict[str, Any] = {"concurrency_id": "rank", "concurrency_limit": 2}
    gr.api(endpoints.rank, api_name="rank", **ranking_options)
    gr.api(endpoints.explain, api_name="explain", **ranking_options)
    gr.api(endpoints.compare, api_name="compare", **ranking_options)
    gr.api(endpoints.list_models, api_name="models", queue=False)
    # A file must pass through a component: gradio then takes none but what the caller uploaded.
    with gr.Row(visible=False):
        file = gr.File(label="file", type="filepath")
        model = gr.Textbox(label="model", value="")
        reading = gr.Textbox(label="long_documents", value="truncate")
        found = gr.JSON(label="nDCG@10 before and after")
        gr.Button().click(
            endpoints.evaluate,
            [file, model, reading],
            found,
            api_name="evaluate",
            api_description="nDCG@10 before and after reranking, of a BEIR folder as .zip or of JSONL.",
            concurrency_id="evaluate",
            concurrency_limit=1,
        )
