"""BM25 beside its formula, worked out word piece by word piece."""

import math

import numpy as np
import pytest

from querit.bm25 import BM25, best_first
from tests.models_for_tests import tokenizer_of

TEXTS = ["The tide rises twice a day, and a day is long.", "海为什么会涨潮，潮汐一天两次", "Feed the starter.", ""]


def by_hand(tokenizer, query, k1=1.5, b=0.75):
    """Lucene's formula (Kamphuis et al. 2020)."""
    texts = [tokenizer.encode(text.lower(), add_special_tokens=False) for text in TEXTS]
    mean = sum(map(len, texts)) / len(texts)
    scores = [0.0] * len(texts)
    for piece in tokenizer.encode(query.lower(), add_special_tokens=False):
        df = sum(piece in text for text in texts)
        for place, text in enumerate(texts):
            tf = text.count(piece)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            scores[place] += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
    return scores


@pytest.mark.parametrize("query", ["Tide day", "潮汐", "the the starter", "zzz", ""])
def test_scores_are_those_of_the_formula_also_when_stored(tmp_path, query):
    tokenizer = tokenizer_of("bert")
    words = BM25(tokenizer, iter(TEXTS))
    assert words.scores(query) == pytest.approx(by_hand(tokenizer, query), abs=1e-5)
    words.save(tmp_path / "bm25")
    again = BM25.load(tmp_path / "bm25", tokenizer)
    assert np.array_equal(again.scores(query), words.scores(query))


def test_texts_without_a_word_piece_score_nothing(tmp_path):
    for texts in ([], ["", ""]):
        words = BM25(tokenizer_of("bert"), texts)
        assert words.scores("tide").tolist() == [0.0] * len(texts)
        words.save(tmp_path / f"{len(texts)}")
        assert BM25.load(tmp_path / f"{len(texts)}", words.tokenizer).scores("tide").tolist() == [0.0] * len(texts)


def test_equal_ones_stay_in_the_order_given():
    assert best_first(np.array([0.0, 2.0, 0.0, 2.0])) == [1, 3, 0, 2]
