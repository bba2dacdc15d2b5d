"""The transplant: an English cross-encoder under a vocabulary of more languages."""

import json
from collections import Counter

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, BertForSequenceClassification

from modeling_querit.modeling_querit import QueritForSequenceClassification
from recipes.base import DICTIONARY, REPORT, BaseArguments, by_english_word, main
from recipes.lib.dictionary import Lexicon
from recipes.lib.pieces import to_wordpiece
from tests.recipes.folders_for_tests import tiny_retriever
from tests.recipes.nano_for_tests import (
    ENGLISH,
    GERMAN,
    JAPANESE,
    kinds,
    save_parallel,
    save_teacher,
    save_vocabulary,
    sentences,
    wordpiece,
)


def arguments(folder, output="base", **changes) -> BaseArguments:
    values = {
        "vocabulary": str(folder / "vocabulary"), "teacher": str(folder / "teacher"),
        "encoder": str(folder / "encoder"), "output_dir": str(folder / output),
        "languages": ["de", "ja"], "parallel": [str(folder / "parallel.jsonl")],
    }  # fmt: skip
    return BaseArguments(**(values | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    save_teacher(folder / "teacher")
    save_vocabulary(folder / "vocabulary")
    save_parallel(folder / "parallel.jsonl", sentences(150))
    tiny_retriever(folder / "encoder")
    main(arguments(folder))
    return folder


def rows_of(folder) -> torch.Tensor:
    return BertForSequenceClassification.from_pretrained(folder).get_input_embeddings().weight.detach()


def test_a_piece_that_both_vocabularies_know_keeps_its_embedding(folder):
    old, new = rows_of(folder / "teacher"), rows_of(folder / "base")
    ids, pieces = wordpiece().get_vocab(), kinds()
    assert len(new) == len(pieces)
    for index, (piece, kind) in enumerate(pieces.items()):
        if kind in ("english", "special"):
            assert torch.equal(new[index], old[ids[to_wordpiece(piece)]]), piece
    assert torch.equal(new[list(pieces).index("▁")], old[ids["[unused1]"]])


def test_the_other_words_lie_next_to_their_translations(folder):
    new, ids = rows_of(folder / "base"), {piece: i for i, piece in enumerate(kinds())}
    english = new[[ids[f"▁{word}"] for word in ENGLISH]]
    for foreign in ([f"▁{word}" for word in GERMAN], [word for word in JAPANESE if len(word) > 1]):
        for piece in foreign:
            nearest = int(cosine_similarity(new[ids[piece]], english).argmax())
            assert ENGLISH[nearest] == ENGLISH[([f"▁{w}" for w in GERMAN] + JAPANESE).index(piece) % len(ENGLISH)]
            # no shorter than words are: the mean of several vectors would be
            assert new[ids[piece]].norm() > 0.9 * english.norm(dim=1).min()


def test_english_pairs_have_the_teachers_logits(folder):
    logits = []
    for name in ("teacher", "base"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        inputs = tokenizer("the old dog sees the house", "the cat likes water, the dog bread.", return_tensors="pt")
        assert inputs["token_type_ids"].tolist()[0] == [0] * 8 + [1] * 10
        with torch.no_grad():
            logits.append(BertForSequenceClassification.from_pretrained(folder / name)(**inputs).logits)
            if name == "base":
                ours = QueritForSequenceClassification.from_pretrained(folder / name)(**inputs).logits
    assert torch.allclose(logits[0], logits[1], atol=1e-5) and torch.allclose(ours, logits[1], atol=1e-5)


def test_the_dictionary_leads_from_english_words_to_each_languages(folder):
    words = json.loads((folder / "base" / DICTIONARY).read_text(encoding="utf-8"))
    assert words.keys() == {"de", "ja"}
    assert words["de"]["▁dog"][0][0] == "▁hund" and words["ja"]["▁bread"][0][0] == "パン"
    assert words["ja"]["▁dog"][0][0] == "犬"  # a character that is a word


def test_a_translation_that_hardly_ever_was_one_is_left_out():
    """Rounded to nothing, it could be a word's only one, and no word can be drawn by weights of 0."""
    kinds = {"▁dog": "english", "▁hund": "de", "▁katze": "de"}
    lexicon = Lexicon({1: {0: 2.5}, 2: {0: 0.0004}}, Counter())
    assert by_english_word(kinds, lexicon, ["de"]) == {"de": {"▁dog": [["▁hund", 2.5]]}}


def test_the_same_again_and_other_settings_are_refused(folder, capsys):
    main(arguments(folder, "again"))
    files = ("model.safetensors", DICTIONARY, "tokenizer.json")
    assert all((folder / "again" / f).read_bytes() == (folder / "base" / f).read_bytes() for f in files)
    config = json.loads((folder / "base" / "config.json").read_text())
    assert config["model_type"] == "bert" and config["architectures"] == ["BertForSequenceClassification"]
    assert "sentence_transformers" not in config and config["pad_token_id"] == 0
    main(arguments(folder))
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"other settings \(temperature\)"):
        main(arguments(folder, temperature=0.1))
    (folder / "again" / REPORT).unlink()
    with pytest.raises(FileExistsError, match="nothing tells how it was made"):
        main(arguments(folder, "again"))
