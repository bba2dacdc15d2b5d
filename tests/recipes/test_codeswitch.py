"""Code-switched training data: word pairs from an encoder, and queries that carry them."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st

from recipes import codeswitch
from recipes.codeswitch import CodeswitchArguments, frequent_words, main, switch, translations
from tests.recipes.folders_for_tests import tiny_retriever

PAIRS = {"how": "wie", "bread": "brot", "keeps": "hält"}


def test_translations_follow_csls_computed_by_hand():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(12, 6))
    b = np.concatenate([a[::-1] + 0.2 * rng.normal(size=a.shape), rng.normal(size=(5, 6))])
    k, least = 3, 0.4
    x, y = ((m - m.mean(0)) / np.linalg.norm(m - m.mean(0), axis=1, keepdims=True) for m in (a, b))
    cosine = x @ y.T
    expected = []
    for i in range(len(x)):
        csls = [
            2 * cosine[i, j] - np.sort(cosine[i])[-k:].mean() - np.sort(cosine[:, j])[-k:].mean() for j in range(len(y))
        ]
        best = int(np.argmax(csls))
        if cosine[i, best] >= least:
            expected.append((i, best))
    assert translations(torch.tensor(a), torch.tensor(b), least, k) == expected
    assert len(expected) >= 8, "the noisy copies are found"


def test_words_that_english_uses_more_are_no_translations():
    german = frequent_words("de", 3000)
    assert "und" in german and "haus" in german
    assert "the" not in german and "of" not in german


def test_every_known_word_is_replaced_and_nothing_else():
    text = switch("How long does bread-dough keep? Bread keeps.", PAIRS, 1.0, False, random.Random(0))
    assert text == "Wie long does brot-dough keep? Brot hält."


def test_words_of_a_language_without_spaces_stand_together():
    pairs = {"bread": "面包", "dough": "面团"}
    assert switch("fresh bread dough rises", pairs, 1.0, True, random.Random(0)) == "fresh 面包面团 rises"


@given(st.text(max_size=60), st.integers(0, 9))
def test_a_text_without_known_words_stays_as_it_is(text, seed):
    assert switch(text, {}, 1.0, False, random.Random(seed)) == text
    assert switch(text, PAIRS, 0.0, True, random.Random(seed)) == text


@pytest.fixture
def data(tmp_path):
    rows = [
        {"target": t, "query": f"how the water of the house {i}", "documents": ["a", f"b{i}"], "labels": [1.0, 0.25]}
        for i in range(20)
        for t in ("english", "other")
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "in.parquet"))
    return tmp_path


def arguments(folder, **values) -> CodeswitchArguments:
    options = {"targets": ["english"], "languages": ["de", "es", "zh"], "words": 60, "similarity": -1.0, **values}
    return CodeswitchArguments(
        data=[str(folder / "in.parquet")],
        output=str(folder / "out.parquet"),
        encoder=str(folder / "encoder"),
        **options,
    )


def test_only_the_named_targets_are_switched_and_labels_stay(data):
    tiny_retriever(data / "encoder")
    main(arguments(data, copies=2, share=1.0, word_share=1.0))
    rows = list(load_dataset("parquet", data_files=str(data / "out.parquet"), split="train"))
    english = [row for row in rows if row["target"] == "english"]
    other = [row for row in rows if row["target"] == "other"]
    assert len(english) == 40 and len(other) == 20
    assert all(row["query"].startswith("how the water of the house") for row in other)
    assert not any("the water" in row["query"] for row in english)
    # Each switched query still stands with its own documents, once per copy.
    for row in rows:
        assert row["labels"] == [1.0, 0.25]
        assert row["query"].endswith(row["documents"][1].removeprefix("b"))
    assert len({row["query"] for row in english}) > 20, "the copies are in different languages"


def test_the_same_seed_gives_the_same_rows_and_a_finished_file_stays(data, capsys):
    tiny_retriever(data / "encoder")
    main(arguments(data))
    first = (data / "out.parquet").read_bytes()
    main(arguments(data))
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"other settings \(seed\)"):
        main(arguments(data, seed=5))
    assert (data / "out.parquet").read_bytes() == first
    (data / "out.parquet").unlink()
    main(arguments(data))
    assert (data / "out.parquet").read_bytes() == first


def test_several_files_are_put_together(data):
    tiny_retriever(data / "encoder")
    Dataset.from_list(
        [{"target": "more", "query": "how the house", "documents": ["c", "d"], "labels": [0.5, 0.0]}]
    ).to_parquet(str(data / "more.parquet"))
    args = arguments(data, targets=["more"], share=0.0)
    args.data.append(str(data / "more.parquet"))
    main(args)
    rows = load_dataset("parquet", data_files=args.output, split="train")
    assert sorted(rows["target"]) == ["english"] * 20 + ["more"] + ["other"] * 20


def test_an_unknown_target_is_named_before_any_work(data, monkeypatch):
    monkeypatch.setattr(codeswitch, "word_pairs", lambda args: pytest.fail("work began"))
    with pytest.raises(ValueError, match=r"No target \['spanish'\] in the data; there are \['english', 'other'\]"):
        main(arguments(data, targets=["spanish"]))
