import json
from collections import Counter

import pytest

from querit.text import joined
from recipes.lib.data import read_corpus
from recipes.lib.documents import detect_language, is_other_language, read_documents
from tests.recipes.folders_for_tests import small_set

SENTENCES = {
    "en": "The old lighthouse stands at the end of the harbour wall and is painted every other summer.",
    "de": "Der alte Leuchtturm steht am Ende der Hafenmauer und wird jeden zweiten Sommer gestrichen.",
    "fr": "Le vieux phare se dresse au bout de la jetée et on le repeint un été sur deux.",
    "es": "El viejo faro está al final del muelle y lo pintan un verano sí y otro no.",
    "ru": "Старый маяк стоит в конце причала, и его красят каждое второе лето.",
    "ko": "오래된 등대는 방파제 끝에 서 있고 두 해에 한 번 여름에 칠을 합니다.",
    "ja": "古い灯台は防波堤の先に立っていて、一年おきの夏に塗り直されます。",
    "zh": "老灯塔在防波堤的尽头，每隔一年的夏天重新粉刷一次。",
}
SHORT = {
    "en": ["how do birds migrate", "heat transfer in pipes"],
    "de": ["wie lange hält ein Akku", "wann fährt der nächste Zug"],
    "fr": ["comment réparer un vélo", "horaires de la bibliothèque"],
    "es": ["cómo arreglar una bicicleta", "horario de la biblioteca"],
    "ru": ["как починить велосипед", "ремонт велосипеда"],
    "ko": ["자전거 수리 방법", "도서관"],
    "ja": ["自転車の直し方", "図書館はどこ"],
    "zh": ["自行车怎么修", "图书馆"],
}


def rows(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_documents_are_id_title_and_text_and_are_counted(tmp_path):
    path = rows(tmp_path / "x.jsonl", [{"id": 7, "text": "Tides", "more": 1}, {"text": " "}])
    counts = Counter()
    assert list(read_documents(path, counts)) == [{"_id": "7", "title": "", "text": "Tides"}]
    assert counts == {"empty": 1}
    assert [d["text"] for d in read_documents(rows(tmp_path / "y.ndjson", [{"body": "x"}]), column="body")] == ["x"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"_id": 1, "text": "a"}, {"_id": "1", "text": "b"}], r"x\.jsonl:2: the id '1' stands at .*x\.jsonl:1 too"),
        ([{"_id": "a\tb", "text": "a"}], "holds a tab"),
        ([{"text": "  "}], "no documents with text.*Left out: 1 without text"),
    ],
)
def test_ids_are_such_as_judgements_can_name(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        list(read_documents(rows(tmp_path / "x.jsonl", lines)))


def test_documents_are_joined_as_in_a_judged_set(tmp_path):
    folder = small_set(tmp_path / "set")
    rows(folder / "corpus.jsonl", [{"_id": str(n), "title": t, "text": "Tides rise."} for n, t in enumerate(["", "T"])])
    assert {d["_id"]: joined(d) for d in read_documents(folder)} == read_corpus(folder)


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_told_of_sentences_and_of_queries(language):
    assert detect_language(SENTENCES[language]) == language
    assert [detect_language(query) for query in SHORT[language]] == [language] * 2
    assert not is_other_language(SENTENCES[language], language)
    others = set(SENTENCES) - {language} - ({"ja"} if language == "zh" else set())
    assert all(is_other_language(SENTENCES[language], other) for other in others)


def test_a_language_is_not_judged_where_it_cannot_be_told():
    assert detect_language("12:45 -- 3.5") == "und"
    assert not is_other_language("PyTorch GPU", "ja")
    assert not is_other_language("東京大学図書館開館時間", "ja")
    assert not is_other_language(SENTENCES["de"], "und")
