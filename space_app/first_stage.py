"""BM25 (bm25s), the order before reranking. Its words are a model's own pieces: Chinese has no blanks to split at."""

from typing import Any

import bm25s
import numpy as np


class FirstStage:
    def __init__(self, tokenizer: Any, documents: list[str]):
        self.tokenizer, self.size = tokenizer, len(documents)
        texts = self.pieces(documents)
        self.vocabulary = {piece: place for place, piece in enumerate(sorted({i for text in texts for i in text}))}
        self.bm25 = bm25s.BM25()
        if self.vocabulary:
            ids = [[self.vocabulary[piece] for piece in text] for text in texts]
            names = {str(place): place for place in self.vocabulary.values()}
            self.bm25.index((ids, names), create_empty_token=False, show_progress=False)

    def pieces(self, texts: list[str]) -> list[list[int]]:
        lowered = [text.lower() for text in texts]
        return self.tokenizer(lowered, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    def scores(self, query: str) -> np.ndarray:
        """float32 `(documents,)`; 0 where not a piece of the query occurs."""
        asked = [self.vocabulary[piece] for piece in self.pieces([query])[0] if piece in self.vocabulary]
        return self.bm25.get_scores_from_ids(asked) if asked else np.zeros(self.size, np.float32)


def best_first(scores: np.ndarray) -> list[int]:
    """Equal ones in the order given."""
    return np.argsort(-scores, kind="stable").tolist()
