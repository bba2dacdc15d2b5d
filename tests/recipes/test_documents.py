import csv
import gzip
import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data import read_corpus
from recipes.documents import detect_language, is_other_language, joined, markdown_headings, read_documents
from tests.recipes.folders_for_tests import small_set

ROWS = [
    {"_id": "a/1", "title": "Tides", "text": 'The moon pulls the sea.\n"Twice a day", they say.'},
    {"_id": "b", "title": "", "text": "图书馆每天早上九点开门,周末休息。"},
]
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


def write(path, form):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if form == "beir":
        path.mkdir()
        (path / "corpus.jsonl").write_text("\n" + text, encoding="utf-8")  # blank lines are no rows
        return path
    file = path.with_suffix(f".{form}")
    if form == "jsonl":
        file.write_text("\ufeff" + text.replace('"_id"', '"id"'), encoding="utf-8")
    elif form == "jsonl.gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        with file.open("w", encoding="utf-8", newline="") as out:
            table = csv.DictWriter(out, ["title", "text", "_id"], delimiter="\t" if form == "tsv" else ",")
            table.writeheader()
            table.writerows(ROWS)
    return file


@pytest.mark.parametrize("form", ["beir", "jsonl", "jsonl.gz", "csv", "tsv"])
def test_every_form_gives_the_same_documents(tmp_path, form):
    assert list(read_documents(write(tmp_path / "docs", form))) == ROWS


def test_a_folder_of_files_is_read_in_order_with_paths_as_ids(tmp_path):
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("\n# The *kettle* #\n\nDescale it.\n\n```\n# no heading\n```\n", encoding="utf-8")
    (folder / "deep" / "a.txt").write_text("# Plain text has no headings.\n", encoding="utf-8")
    (folder / "c.md").write_text("Words first.\n\nThen a heading\n---\nand more.", encoding="utf-8")
    (folder / "d.png").write_bytes(b"\xff\xfe")
    (folder / "e.txt").write_text(" \n", encoding="utf-8")
    counts = Counter()
    assert list(read_documents(folder, counts)) == [
        {"_id": "b.md", "title": "The kettle", "text": "Descale it.\n\n```\n# no heading\n```"},
        {"_id": "c.md", "title": "Then a heading", "text": "Words first.\n\nThen a heading\n---\nand more."},
        {"_id": "deep/a.txt", "title": "", "text": "# Plain text has no headings."},
    ]
    assert counts == {"empty": 1}
    assert markdown_headings("# A\ntext\n## `b` and c\n") == [("A", 0, 1), ("b and c", 2, 3)]


@given(st.lists(st.tuples(st.text(), st.text(min_size=1).filter(str.strip)), min_size=1, max_size=5))
def test_any_text_comes_back_from_jsonl_and_csv(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"_id": str(n), "title": title.strip(), "text": text} for n, (title, text) in enumerate(rows)]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with (folder / "x.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["_id", "title", "text"])
        table.writeheader()
        table.writerows(rows)
    assert list(read_documents(folder / "x.jsonl")) == list(read_documents(folder / "x.csv")) == rows


def test_documents_are_streamed(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken", encoding="utf-8")
    documents = read_documents(path)
    assert list(islice(documents, 1)) == ROWS[:1]
    with pytest.raises(ValueError, match="line 2"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}\n', "'1' stands more than once"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "row 2: no text under `text`"),
        ("x.jsonl", b"[1]\n", "row 1: no text"),
        ("x.jsonl", b'{"_id": "a\\tb", "text": "a"}\n', "holds a tab"),
        ("x.jsonl", '{"text": "é"}\n'.encode("latin-1"), "not UTF-8.*iconv"),
        ("x.csv", "text\né\n".encode("latin-1"), "not UTF-8.*iconv"),
        ("x.csv", b"body,id\na,1\n", r"no column `text`; its columns are \['body', 'id'\]"),
        ("x.csv", b"id,text\n1,a\n2,Hello, world, unquoted\n", r"x\.csv, line 3: more fields than columns.*double"),
        ("x.csv", b'id,text\n1,"a\nb"\n2,"Unclosed\n3,c\n4,d\n', r"x\.csv, line 4: unexpected end of data.*end with"),
        ("x.tsv", b'id\ttext\n1\t"first" of all\n', r"x\.tsv, line 2: .*quotes inside it must be doubled"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b \\ud83d"}\n', r"x\.jsonl, line 2: .*half of a character"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 5000)[:-20], r"x\.jsonl\.gz is damaged after line \d+"),
        ("x.jsonl.gz", b'{"text": "not packed"}\n', r"x\.jsonl\.gz is damaged after line 0"),
        ("beir/corpus.jsonl", b'\n{"_id": "a", "title": "b"}\n', r"corpus\.jsonl, row 2: no text under `text`"),
        ("x.jsonl", b'{"text": "  "}\n', "no documents with text"),
        ("x.pdf", b"%PDF", "of no kind that can be read"),
        ("folder/x.txt", "é".encode("latin-1"), "x.txt is not UTF-8"),
        ("folder/x.html", b"<p>", "no documents with text"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / name.split("/")[0]))


def test_a_path_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_documents(tmp_path / "nothing.jsonl"))


def test_long_fields_of_a_table_are_read(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text\n" + "word " * 50_000 + "\n", encoding="utf-8")
    assert len(next(iter(read_documents(path)))["text"]) == 250_000


def test_joined_text_is_that_of_the_corpus_reader(tmp_path):
    folder = small_set(tmp_path / "set")
    (folder / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": str(n), "title": title, "text": "Tides rise."}) + "\n"
            for n, title in enumerate(["", "Tides", "The sea"])
        )
    )
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
