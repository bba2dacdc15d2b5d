"""A request on its way: encoded a few documents at a time, scored in as many rounds as it takes."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

DOCUMENTS_ENCODED = 32  # at once: a long request is encoded bit by bit, as it is scored

Document = str | Mapping[str, Any]


class TooLongError(ValueError):
    """A pair does not fit the model, of a request that wants nothing cut."""


@dataclass(frozen=True)
class Scored:
    """What became of a document."""

    index: int  # its place in the request
    logit: float
    probability: float
    passage: tuple[int, int] | None  # characters [start, end) of the best window, where there were several


class Answer(NamedTuple):
    results: list[Scored]  # in the order asked
    tokens: int  # of all pairs that were scored


class Job:
    """Queries, each with documents; `future` gets their `Answer`.

    Args:
        max_tokens_per_doc: documents are cut there first.
        truncate: whether pairs that do not fit the model are cut, or are a TooLongError.
    """

    def __init__(
        self,
        requests: Sequence[tuple[str, Sequence[Document]]],
        instruction: str | None = None,
        long_documents: str = "truncate",
        max_tokens_per_doc: int | None = None,
        truncate: bool = True,
    ):
        self.options = {"instruction": instruction, "long_documents": long_documents}
        self.max_tokens_per_doc, self.truncate = max_tokens_per_doc, truncate
        self.future: Future[Answer] = Future()
        self.allowance = 0  # tokens that may still be taken in this turn
        self.tokens = 0  # taken so far
        self.logits: list[float] = []  # of the pairs taken, in order
        at_once = 1 if long_documents == "max_passage" else DOCUMENTS_ENCODED
        self._todo = deque(
            (query, documents[start : start + at_once])
            for query, documents in requests
            for start in range(0, len(documents), at_once)
        )
        self._encoded: deque = deque()
        self._spans: list[list[tuple[int, int] | None]] = []  # of each document's windows

    @property
    def is_taken(self) -> bool:
        return not self._todo and not self._encoded

    def take(self, ranker: Any, tokens: int) -> list:
        """The next encoded pairs, of so many tokens or a pair more. Raises ValueError for what cannot be encoded."""
        taken: list = []
        while tokens > 0 and not self.is_taken:
            if not self._encoded:
                self._encode(ranker, *self._todo.popleft())
            pair = self._encoded.popleft()
            taken.append(pair)
            tokens -= pair.num_tokens
            self.allowance -= pair.num_tokens
            self.tokens += pair.num_tokens
        return taken

    def _encode(self, ranker: Any, query: str, documents: Sequence[Document]) -> None:
        if self.max_tokens_per_doc is not None:
            documents = [cut(ranker.tokenizer, document, self.max_tokens_per_doc) for document in documents]
        for windows in ranker.preprocess([(query, documents)], **self.options)[0]:
            if not self.truncate and any(window.truncated for window in windows):
                raise TooLongError(
                    f"A query with its document must have at most {ranker.max_length} tokens. Shorten them, or set "
                    "truncate to true."
                )
            self._encoded.extend(windows)
            self._spans.append([window.span for window in windows])

    def answer(self) -> Answer:
        """Of each document the best window, the first of equal ones."""
        logits = iter(self.logits)
        best = [max((next(logits), -place) for place, _ in enumerate(spans)) for spans in self._spans]
        probabilities = torch.sigmoid(torch.tensor([logit for logit, _ in best], dtype=torch.float64)).tolist()
        results = [
            Scored(index, logit, probability, spans[-place] if len(spans) > 1 else None)
            for index, ((logit, place), probability, spans) in enumerate(
                zip(best, probabilities, self._spans, strict=True)
            )
        ]
        return Answer(results, self.tokens)


def cut(tokenizer: Any, document: Document, tokens: int) -> Document:
    """The document with its text cut after so many tokens; a title is not counted."""
    text = document if isinstance(document, str) else document["text"]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= tokens:
        return document
    kept = text[: offsets[tokens - 1][1]]
    return kept if isinstance(document, str) else {**document, "text": kept}
