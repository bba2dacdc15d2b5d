"""Groups across languages, labelled by a teacher that reads their English sides."""

import json
import random
import re

import pytest
import torch
from datasets import load_dataset
from transformers import AutoTokenizer, BertForSequenceClassification

from recipes.crosslingual import CrosslingualArguments, main
from recipes.lib.groups import Builder, Pool, aligned_groups, question_groups, read_judged, sources, switch
from recipes.lib.parallel import read_aligned, read_parallel
from recipes.train import tokenize_groups
from tests.recipes.folders_for_tests import write_beir
from tests.recipes.nano_for_tests import (
    ENGLISH,
    GERMAN,
    JAPANESE,
    save_parallel,
    save_teacher,
    save_vocabulary,
    sentences,
)

MIX = {"english": 1, "switched": 6, "questions": 9, "aligned": 8, "sentences": 7, "monolingual": 5, "pooled": 4}
WORDS = {f"▁{e}": [[f"▁{g}", 1.0]] for e, g in zip(ENGLISH, GERMAN, strict=True)}
CHARACTERS = {f"▁{e}": [[j, 1.0]] for e, j in zip(ENGLISH, JAPANESE, strict=True)}


def judged_folder(folder, language, ids):
    """A folder of one language: a query and a section of each id."""
    rows = {key: sentences(1, seed=n)[0][language] for n, key in enumerate(ids)}
    heads = {key: f"{sentences(1, seed=50 + n)[0][language]} {n}" for n, key in enumerate(ids)}
    corpus = {key: " ".join([text, heads[key], text]) for key, text in rows.items()}
    return write_beir(folder, corpus, heads, {key: {key: 1} for key in ids})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    save_teacher(folder / "teacher")
    save_vocabulary(folder / "base")
    (folder / "base" / "dictionary.json").write_text(json.dumps({"de": WORDS, "ja": CHARACTERS}), encoding="utf-8")
    ids = [f"s{n}" for n in range(24)]
    for language in ("en", "de", "ja"):
        judged_folder(folder / language, language, ids)
    save_parallel(folder / "sentences.jsonl", sentences(40, seed=3))
    rows = [{"id": str(n), "q": row} for n, row in enumerate(sentences(15, seed=4))]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def arguments(folder, output="groups.parquet", **changes) -> CrosslingualArguments:
    folders = {language: str(folder / language) for language in ("en", "de", "ja")}
    values = {
        "output": str(folder / output), "base": str(folder / "base"), "teacher": str(folder / "teacher"),
        "mix": MIX,
        "english": [{"folder": folders["en"], "queries": 20}],
        "monolingual": [{"folder": folders["de"], "queries": 10}],
        "questions": [str(folder / "questions.jsonl")], "sentences": [str(folder / "sentences.jsonl")],
        "aligned": {"help": folders}, "pooled": {"wiki": folders}, "shard_size": 8, "seed": 2,
    }  # fmt: skip
    return CrosslingualArguments(**(values | changes))


@pytest.fixture(scope="module")
def rows(folder):
    main(arguments(folder))
    return list(load_dataset("parquet", data_files=str(folder / "groups.parquet"), split="train"))


ENGLISH_OF = dict(zip([*GERMAN, *JAPANESE], ENGLISH * 2, strict=True))


VERBS = ENGLISH[7:10]


def in_english(text: str) -> str:
    """The made-up languages put back: word for word, a verb at the end of its sentence to where English has it."""
    found = re.findall("|".join([*sorted(JAPANESE, key=len, reverse=True), "[a-zß]+", "[0-9]+", "[.]"]), text)
    words = [ENGLISH_OF.get(word, word) for word in found]
    for end in range(6, len(words) + 1):
        if words[end - 1] in VERBS and words[end : end + 1] in ([], ["."]):
            words[end - 6 : end] = [*words[end - 6 : end - 3], words[end - 1], *words[end - 3 : end - 1]]
    return " ".join(words)


def test_labels_are_the_teachers_logits_of_the_english_sides(folder, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    model = BertForSequenceClassification.from_pretrained(folder / "teacher").eval()
    checked = 0
    for row in rows:
        assert row["labels"] == pytest.approx(torch.tensor(row["scores"]).sigmoid().tolist(), abs=1e-5)
        if row["target"] in ("monolingual", "pooled"):
            assert row["scores"] == [4.3 if relevant else -4.3 for relevant in row["relevant"]]
            assert row["relevant"] == [True, False, False, False]
            assert row["english_query"] == "" and row["english_documents"] == []
            continue
        assert in_english(row["query"]) == in_english(row["english_query"])
        assert list(map(in_english, row["documents"])) == list(map(in_english, row["english_documents"]))
        for document, score in zip(row["documents"], row["scores"], strict=True):
            inputs = tokenizer(in_english(row["query"]), in_english(document), return_tensors="pt")
            with torch.no_grad():
                assert score == pytest.approx(model(**inputs).logits.item(), abs=1e-3), (row["query"], document)
            checked += 1
    assert checked == 4 * (1 + 6 + 9 + 8 + 7)


def test_the_kinds_are_mixed_as_told_and_say_what_is_relevant(rows):
    counts = {kind: sum(row["target"] == kind for row in rows) for kind in {row["target"] for row in rows}}
    assert counts == MIX
    assert [row["target"] for row in rows] != sorted(row["target"] for row in rows)
    for row in rows:
        assert len(row["documents"]) == len(row["scores"]) == 4
        assert row["relevant"] == [row["target"] != "questions", False, False, False]
    assert any(set(JAPANESE) & set(row["query"]) for row in rows if row["target"] == "switched")


def test_the_same_seed_gives_the_same_file(folder, rows, capsys):
    main(arguments(folder, "again.parquet"))
    assert list(load_dataset("parquet", data_files=str(folder / "again.parquet"), split="train")) == rows
    assert not (folder / "again.parquet.work").exists()
    main(arguments(folder, "again.parquet"))
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mix names riddles, of which the sources make none"):
        main(arguments(folder, "other.parquet", mix={"riddles": 3}))


def test_languages_are_drawn_by_their_weights(folder):
    builder = Builder(None, {"de": WORDS, "ja": CHARACTERS}, 4, random.Random(0), {"ja": 3.0})
    drawn = [builder.draw_languages(["de", "ja"])[0] for _ in range(4000)]
    assert drawn.count("ja") / 4000 == pytest.approx(3 / 4, abs=0.03)  # de, left out, has 1
    assert sorted(builder.draw_languages(["de", "ja"], 5)) == ["de", "ja"]
    for wrong in ({"fr": 1.0}, {"de": 0.0}):
        with pytest.raises(ValueError, match="must be one of de, ja, with a weight above 0"):
            main(arguments(folder, "other.parquet", languages=wrong))


def test_training_reads_them(folder, rows):
    data = load_dataset("parquet", data_files=str(folder / "groups.parquet"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    first = tokenize_groups(data, tokenizer, 64, "scores")[0]
    assert first["labels"] == rows[0]["scores"] and len(first["input_ids"]) == len(first["token_type_ids"]) == 4
    types = first["token_type_ids"][0]
    assert types == sorted(types) and set(types) == {0, 1}


def test_texts_are_cut_to_length(folder):
    sizes = {"short_tokens": 6, "long_tokens": 9, "long_share": 0.5, "query_tokens": 3}
    main(arguments(folder, "cut.parquet", **sizes))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    lengths = set()
    for row in load_dataset("parquet", data_files=str(folder / "cut.parquet"), split="train"):
        assert len(tokenizer.tokenize(row["query"])) <= 3
        lengths |= {len(tokenizer.tokenize(text)) for text in row["documents"]}
    assert {6, 9} <= lengths and max(lengths) <= 9


def test_some_groups_hold_an_empty_passage_and_its_label_is_the_lowest(folder, rows):
    main(arguments(folder, "empty.parquet", empty_share=0.5, workers=2))
    found = load_dataset("parquet", data_files=str(folder / "empty.parquet"), split="train")
    emptied = [row for row in found if "" in row["documents"]]
    assert 0.25 < len(emptied) / len(found) < 0.75 and {row["target"] for row in emptied} > {"monolingual", "switched"}
    for row in emptied:
        place = row["documents"].index("")
        assert row["documents"].count("") == 1 and not row["relevant"][place]
        assert row["scores"][place] == -11 == min(row["scores"])
        assert row["english_documents"] == [] or row["english_documents"][place] == ""
    assert all("" not in row["documents"] for row in rows)


def test_one_negative_comes_from_farther_away(folder):
    judged = read_judged(str(folder / "en"))
    builder = Builder(AutoTokenizer.from_pretrained(folder / "base"), {"de": WORDS}, 4, random.Random(0))
    pool, places = Pool(builder, list(judged.passages.values())), []
    for query, (positive, *negatives), _ in sources(builder, judged, 24):
        nearest = pool.nearest(query, 60, [positive])
        places.append([nearest.index(row) for row in negatives])
    assert all(max(near) < 12 <= far for *near, far in places) and len(places) == 24


def test_whole_known_words_are_switched_and_nothing_else(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base").backend_tokenizer
    rng = random.Random(0)
    assert switch("The dog, doggy and the ship.", tokenizer, WORDS, 1.0, rng) == "das hund , doggy and das schiff ."
    assert switch("the bread", tokenizer, CHARACTERS, 1.0, rng) == "そのパン"
    assert switch("The dog!", tokenizer, {}, 1.0, rng) == "the dog !"
    assert switch("", tokenizer, WORDS, 1.0, rng) == ""


def test_names_that_the_dictionary_lacks_are_spelt_in_cyrillic(folder):
    tokenizer, rng = AutoTokenizer.from_pretrained(folder / "base").backend_tokenizer, random.Random(0)
    russian = {"▁dog": [["▁собака", 1.0]]}
    found = switch("The Dog of Bob Ott, old as Utah-42 and O'Tom.", tokenizer, russian, 1.0, rng, cyrillic=True)
    words = found.split()
    assert words[:3] == ["the", "собака", "of"] and re.fullmatch("боб(а|у|ом|е)?", words[3])
    assert re.fullmatch("[а-я]+", words[4]) and words[4].startswith("от") and words[5:8] == [",", "old", "as"]
    # a capital at the start of a sentence makes no name of a word that the vocabulary knows; two letters are none
    assert re.fullmatch("[а-я]+", words[8]) and words[9:13] == ["-", "42", "and", "o"]
    assert switch("The Dog of Bob.", tokenizer, russian, 1.0, rng) == "the собака of bob ."
    assert switch("The Dog of Bob.", tokenizer, russian, 0.0, rng, cyrillic=True) == "the dog of bob ."


def test_a_heading_that_stands_twice_is_no_query_and_questions_need_english(folder):
    builder = Builder(AutoTokenizer.from_pretrained(folder / "base"), {"de": WORDS}, 4, random.Random(0))
    folders = {language: read_judged(str(folder / language), title=False) for language in ("en", "de")}
    folders["en"].queries |= {"s1": "the same", "s2": "the same"}
    asked = {group.english[0] for group in aligned_groups(builder, folders, 1)}
    assert asked and "the same" not in asked
    assert list(question_groups(builder, [{"de": "das hund"}, {"en": "the dog"}], ["a", "b", "c", "d", "e"])) == []


def test_parallel_text_of_each_form(tmp_path, folder):
    forms = [
        {"sl": "de", "s": "das haus", "tl": "en", "t": "the house"},
        {"doc": "1", "sents": {"en": ["a dog", "a cat"], "de": ["hund", "katze"]}},
        {"page": "p", "title": {"en": "bread"}, "desc": {"de": "brot"}},
        {"q": {"en": "a ship?", "ja": "船か"}},
    ]
    path = tmp_path / "forms.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in forms), encoding="utf-8")
    assert list(read_parallel(path)) == [
        {"de": "das haus", "en": "the house"}, {"en": "a dog", "de": "hund"}, {"en": "a cat", "de": "katze"},
        {"en": "bread"}, {"de": "brot"}, {"en": "a ship?", "ja": "船か"},
    ]  # fmt: skip
    texts = list(read_aligned({"en": str(folder / "en"), "de": str(folder / "de")}))
    assert len([text for text in texts if text.keys() == {"en", "de"}]) == 24
    path.write_text('{"text": "no translation"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"forms.jsonl:1: no row of parallel text"):
        list(read_parallel(path))
