"""BM25 (bm25s, Lucene's variant) over a tokenizer's word pieces: Chinese and Japanese have no words to split at."""

import itertools
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

BATCH = 1024  # texts tokenised at once


class BM25:
    """The scores of texts, in the order given, for a query. bm25s builds an index in one go, in memory.

    Args:
        tokenizer: a transformers tokenizer.
        texts: read once; some 30 bytes are taken for every different word piece of a text.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str]):
        self.tokenizer, stream = tokenizer, iter(texts)
        rows: list[array] = []  # 4 bytes a piece
        while batch := list(itertools.islice(stream, BATCH)):
            rows += [array("i", ids) for ids in self.pieces(batch)]
        self.size = len(rows)
        self.vocabulary = np.unique(np.concatenate([np.empty(0, np.int32), *map(np.unique, rows)]))
        self.index = bm25s.BM25()
        if len(self.vocabulary):
            places = [np.searchsorted(self.vocabulary, row) for row in rows]
            names = {str(place): place for place in range(len(self.vocabulary))}
            self.index.index((places, names), create_empty_token=False, show_progress=False)

    def pieces(self, texts: list[str]) -> list[list[int]]:
        lowered = [text.lower() for text in texts]
        return self.tokenizer(lowered, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    def scores(self, query: str) -> np.ndarray:
        """-> float32 `(texts,)`; 0 where not a piece of the query occurs."""
        asked = np.array(self.pieces([query])[0], np.int32)
        places = np.searchsorted(self.vocabulary, asked[np.isin(asked, self.vocabulary)])
        return self.index.get_scores_from_ids(places.tolist()) if len(places) else np.zeros(self.size, np.float32)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if len(self.vocabulary):
            self.index.save(folder, show_progress=False)
        np.savez(Path(folder) / "pieces.npz", vocabulary=self.vocabulary, size=self.size)

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any) -> "BM25":
        """What `save` wrote, with the tokenizer that it was made with. The postings are mapped, not read."""
        loaded = cls.__new__(cls)
        loaded.tokenizer = tokenizer
        with np.load(Path(folder) / "pieces.npz", allow_pickle=False) as stored:
            loaded.vocabulary, loaded.size = stored["vocabulary"], int(stored["size"])
        loaded.index = bm25s.BM25.load(folder, mmap=True, show_progress=False) if len(loaded.vocabulary) else None
        return loaded


def best_first(scores: np.ndarray) -> list[int]:
    """Equal ones in the order given."""
    return np.argsort(-scores, kind="stable").tolist()
