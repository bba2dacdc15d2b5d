"""What foreign pieces mean: IBM Model 1 and nearest words, against computations of their own."""

import random
from collections import defaultdict

import numpy as np
import pytest
import torch

from recipes.lib.dictionary import build_lexicon, ibm_model_1, neighbours
from recipes.lib.pieces import unigram
from tests.recipes.nano_for_tests import ENGLISH, GERMAN, JAPANESE, kinds, sentences


def slow_model_1(pairs, iterations, smoothing):
    """By the book, with dictionaries: -> (t(e|f), expected counts), NULL being None."""
    t = defaultdict(lambda: 1.0)
    for _ in range(iterations):
        count, total = defaultdict(float), defaultdict(float)
        for foreign, english in pairs:
            for e in english:
                sources = [*foreign, None]
                norm = sum(t[f, e] for f in sources)
                for f in sources:
                    count[f, e] += t[f, e] / norm
                    total[f] += t[f, e] / norm
        t = defaultdict(float, {(f, e): c / (total[f] + smoothing) for (f, e), c in count.items()})
    return t, count


@pytest.mark.parametrize("seed", range(3))
def test_model_1_agrees_with_a_slow_computation(seed):
    rng = random.Random(seed)
    pairs = [
        ([rng.randint(0, 6) for _ in range(rng.randint(1, 5))], [rng.randint(2, 9) for _ in range(rng.randint(1, 6))])
        for _ in range(12)
    ]
    found = ibm_model_1([*pairs, ([], [3]), ([4], [])], 4, smoothing=0.05)
    t, count = slow_model_1(pairs, 4, 0.05)
    rows = {(int(f), int(e)): i for i, (f, e) in enumerate(zip(found.foreign, found.english, strict=True))}
    assert rows.keys() == {(f, e) for f, e in count if f is not None}
    for (f, e), row in rows.items():
        assert found.probability[row] == pytest.approx(t[f, e]) and found.count[row] == pytest.approx(count[f, e])


def test_no_pairs_mean_nothing():
    assert len(ibm_model_1([], 3).foreign) == 0


def test_the_lexicon_of_a_made_up_bitext_is_the_one_it_was_made_with():
    pieces = kinds()
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = unigram({piece: -100.0 if kind == "special" else -6.0 for piece, kind in pieces.items()})
    rows = sentences(120)
    pairs = {language: [(row[language], row["en"]) for row in rows] for language in ("de", "ja")}
    english = {i for i, kind in enumerate(pieces.values()) if kind == "english"}
    lexicon = build_lexicon(pairs, tokenizer, english, most_pairs=100, iterations=6)
    for foreign in ([f"▁{word}" for word in GERMAN], JAPANESE):
        for piece, meaning in zip(foreign, ENGLISH, strict=True):
            assert lexicon.best(ids[piece], 1)[0][0] == ids[f"▁{meaning}"], piece
    assert all(meaning in english for found in lexicon.meanings.values() for meaning in found)
    assert 90 < lexicon.seen[ids["▁das"]] / 2 <= 100  # twice a sentence, in the pairs that were drawn
    again = build_lexicon(pairs, tokenizer, english, most_pairs=100, iterations=6)
    assert again == lexicon


def test_neighbours_follow_csls_computed_by_hand():
    rng = np.random.default_rng(3)
    anchors = rng.normal(size=(9, 6))
    words = np.concatenate([anchors[::-1] + 0.2 * rng.normal(size=anchors.shape), rng.normal(size=(5, 6))])
    middle = np.concatenate([words, anchors]).mean(0)
    x, y = ((m - middle) / np.linalg.norm(m - middle, axis=1, keepdims=True) for m in (words, anchors))
    cosine = x @ y.T
    csls = np.array(
        [[2 * cosine[i, j] - np.sort(cosine[:, j])[-3:].mean() for j in range(len(y))] for i in range(len(x))]
    )
    values, rows = neighbours(torch.tensor(words), torch.tensor(anchors), 2, hub_size=3)
    assert np.array_equal(rows.numpy(), np.argsort(-csls, axis=1)[:, :2])
    assert np.allclose(values.numpy(), -np.sort(-csls, axis=1)[:, :2])
    assert rows[:9, 0].tolist() == list(range(9))[::-1], "the noisy copies find each other"
