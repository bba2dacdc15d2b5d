"""The left column of the tab "Rank": query, documents, a file that fills their box, and options."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from space_app import ranking, views
from space_app.inputs import DOCUMENT_FILES, join_documents, read_table, split_documents
from space_app.limits import Limits, check_documents
from space_app.models import Models
from space_app.share import Shared

INSTRUCTIONS = [
    "Find the passage that answers the question.",
    "Find texts about the same subject, whether they answer or not.",
    "Find the same question asked in other words.",
    "Find the instructions that solve the problem.",
    "Find what speaks against the claim.",
]
READING = [("Read the beginning", "truncate"), ("Read everything; the best passage counts", "max_passage")]
PARTING = [("a line", "line"), ("a paragraph", "paragraph"), ("what lies between lines of %%%", "section")]


class RankInputs:
    """Made within a column. `given` are the components whose values `request` takes, in this order."""

    def __init__(self, models: Models, limits: Limits):
        self.models, self.limits = models, limits
        self.query = gr.Textbox(
            label="Query", placeholder="What are you looking for?", lines=1, max_lines=4, elem_id="query"
        )
        self.text = gr.Textbox(
            label="Documents",
            placeholder="Paste one document per line, or drop files below.",
            lines=9,
            max_lines=16,
            elem_id="documents",
        )
        self.parting = gr.Radio(PARTING, value="line", label="A document is", elem_id="parting")
        self.buttons = gr.Row()
        with gr.Accordion("Documents from files", open=False, elem_id="from-file"):
            self.file = gr.File(
                label=f"{', '.join(DOCUMENT_FILES)}, up to {limits.file_bytes / 1e6:g} MB",
                file_types=list(DOCUMENT_FILES),
                file_count="multiple",
                type="filepath",
                height=150,
                elem_id="file",
            )
            self.column = gr.Dropdown([], label="Column that holds the text", visible=False, elem_id="column")
            self.file_note = gr.HTML(apply_default_css=False)
        with gr.Accordion("Options", open=False, elem_id="options"):
            self._add_options()
        self.given = [self.query, self.text, self.parting, self.instruction, self.reading, self.model]

    def _add_options(self) -> None:
        names = self.models.names
        self.model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
        self.instruction = gr.Dropdown(
            ["", *INSTRUCTIONS],
            value="",
            allow_custom_value=True,
            label="Instruction",
            info="What relevance means here: choose one, write your own, or leave it empty.",
            visible=False,  # until the model is known to take one
            elem_id="instruction",
        )
        self.reading = gr.Radio(READING, value="truncate", label="Long documents", elem_id="reading")

    def request(self, query, pasted, separator, *rest) -> ranking.Request:
        return ranking.make_request(self.models, self.limits, query, split_documents(pasted, separator), *rest)

    def offer_instruction(self, name: str) -> Any:
        """The field, emptied where the model takes none."""
        if self.models.takes_instruction(self.models.name(name)):
            return gr.Dropdown(visible=True)
        return gr.Dropdown(value="", visible=False)

    def of_example(self, example: dict) -> tuple:
        """The values of `given` but for the model, which stays."""
        joined, separator = join_documents(example["documents"])
        return example["query"], joined, separator, "", example.get("long_documents", "truncate")

    def of_link(self, shared: Shared) -> tuple:
        joined, separator = join_documents(shared.documents)
        name = shared.model if shared.model in self.models.sources else self.models.names[0]
        instruction = shared.instruction if self.models.takes_instruction(name) else ""
        return shared.query, joined, separator, instruction, shared.long_documents, name

    def read_files(self, paths: list[str] | None, separator: str, chosen: str | None = None) -> Iterator[dict]:
        if not paths:
            yield {self.file_note: "", self.column: gr.Dropdown(visible=False)}
            return
        yield {self.column: gr.Dropdown(visible=False)}
        table = read_table(paths, separator, self.limits)
        name = chosen if chosen in table.columns else table.likely_column
        documents = check_documents(table.documents(name), self.limits)
        joined, parted = join_documents(documents)
        choice = bool({*table.columns} - {"_id", "id", "title", "text"})
        count = f"{len(documents):,} document{'' if len(documents) == 1 else 's'}"
        yield {
            self.text: joined,
            self.parting: parted,
            self.column: gr.Dropdown(table.columns, value=name, visible=choice),
            self.file_note: views.note(f"{count} in the box above, where you can edit the text."),
        }
