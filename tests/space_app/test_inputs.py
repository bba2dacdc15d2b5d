"""Pasted text and files, harmless and hostile."""

import csv
import io
import json
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_app.inputs import join_documents, read_judged, read_table, split_documents
from space_app.limits import Limits, RefusedError

LIMITS = Limits()


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_is_parted_as_asked():
    text = "one\ntwo\n\n three \n%%%\n\nfour"
    assert split_documents(text, "line") == ["one", "two", "three", "%%%", "four"]
    assert split_documents(text, "paragraph") == ["one\ntwo", "three \n%%%", "four"]
    assert split_documents(text, "section") == ["one\ntwo\n\n three", "four"]
    assert split_documents("a\r\nb", "line") == ["a", "b"]
    for separator in ("line", "paragraph", "section"):
        assert split_documents(" \n\n", separator) == []


@given(st.lists(st.text(st.sampled_from("ab%é日 \n"), min_size=1).map(str.strip).filter(bool), max_size=6))
def test_documents_survive_the_box(documents):
    text, separator = join_documents(documents)
    again = split_documents(text, separator)
    if not any("%%%" in document for document in documents):
        assert again == documents


@pytest.mark.parametrize(
    ("name", "content", "columns", "column", "documents"),
    [
        ("a.txt", "one\ntwo\n", [""], "", ["one", "two"]),
        ("a.md", "# Head\nbody\n\nmore", [""], "", ["# Head\nbody", "more"]),
        ("a.csv", 'id,body\n1,"a, b"\n2,c\n', ["id", "body"], "body", ["a, b", "c"]),
        ("a.CSV", "text,title\nrise,Tide\nfall,\n", ["text", "title"], "text", ["Tide rise", "fall"]),
        ("a.tsv", "id\tlong\n1\tthe text\n", ["id", "long"], "long", ["the text"]),
        ("a.jsonl", '{"text": "rise", "title": "Tide"}\n"fall"\n', ["text", "title"], "text", ["Tide rise", "fall"]),
        ("a.jsonl", '\ufeff{"body": "a"}\n\n{"body": ""}\n', ["body"], "body", ["a"]),
        ("a.csv", "a,b\n1\n1,2,3,4\n", ["a", "b"], "a", ["1", "1"]),
    ],
)  # fmt: skip
def test_files_become_documents(tmp_path, name, content, columns, column, documents):
    table = read_table(write(tmp_path, name, content), "line", LIMITS)
    assert table.columns == columns and table.likely_column == column
    assert table.documents(column) == documents
    with pytest.raises(RefusedError, match="no such column"):
        table.documents("evil")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.exe", "MZ", "this type are not read"),
        ("a", "text", "this type are not read"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", " \n", "no documents"),
        ("a.csv", "", "no documents"),
        ("a.csv", "only,a,head\n", "no documents"),
        ("a.jsonl", '{"text": "a"}\n{broken', "Line 2 of the file"),
        ("a.jsonl", "[" * 100_000, "Line 1 of the file"),
        ("a.jsonl", "[1, 2]", "Row 1 of the file is neither"),
        ("a.jsonl", '{"n": 1}', "no documents"),
        ("a.txt", "x" * (LIMITS.file_bytes + 1), "5.0 MB; at most 5 MB"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_words(tmp_path, name, content, words):
    with pytest.raises(RefusedError, match=words):
        table = read_table(write(tmp_path, name, content), "line", LIMITS)
        table.documents(table.likely_column)


def test_a_field_of_a_megabyte_is_read(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text"], ["x" * 1_000_000]])
    assert len(read_table(path, "line", LIMITS).documents("text")[0]) == 1_000_000


def beir(corpus=None, queries=None, qrels=None, folder="set/"):
    files = {
        "corpus.jsonl": corpus or '{"_id": "d1", "title": "Tide", "text": "rises"}\n{"_id": "d2", "text": "flour"}\n',
        "queries.jsonl": queries or '{"_id": "q1", "text": "tide"}\n{"_id": "q2", "text": "unanswered"}\n',
        "qrels/test.tsv": qrels or "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\tgone\t1\n",
    }
    return {folder + name: content for name, content in files.items()}


def pack(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content, **options)
    return path


@pytest.mark.parametrize("folder", ["", "set/", "__MACOSX/../set/"])
def test_a_packed_beir_folder_is_read_without_queries_that_nothing_answers(tmp_path, folder):
    judged = read_judged(pack(tmp_path / "set.zip", beir(folder=folder)), LIMITS)
    assert judged.queries == {"q1": "tide"} and judged.corpus == {"d1": "Tide rises", "d2": "flour"}
    assert judged.qrels == {"q1": {"d1": 2, "d2": 0}} and judged.candidates == {}


def test_rows_of_judged_texts_are_read(tmp_path):
    rows = [
        {"query": "tide", "positive": ["rises"], "negative": ["flour", "rises"]},
        {"query": "x", "positive": "flour"},
    ]
    judged = read_judged(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))), LIMITS)
    assert judged.qrels == {"1": {"d0": 1, "d1": 0}, "2": {"d1": 1}}
    assert judged.candidates == {"1": ["d0", "d1"], "2": ["d1"]} and judged.corpus == {"d0": "rises", "d1": "flour"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.txt": "x"}, "no corpus.jsonl"),
        ({k: v for k, v in beir().items() if "qrels" not in k}, "no qrels/test.tsv"),
        (beir(corpus='{"id": 1}'), "not as in a BEIR folder"),
        (beir(corpus="[]"), "not as in a BEIR folder"),
        (beir(queries='{"_id": "q1", "text": 3}'), "not as in a BEIR folder"),
        (beir(qrels="query-id\tcorpus-id\tscore\nq1\td1\tmany\n"), "not as in a BEIR folder"),
        (beir(qrels="query-id\tcorpus-id\tscore\nq1\td1\t0\n"), "no query with a relevant document"),
        (beir(corpus=b"\xff"), "not UTF-8"),
        ({f"{n}.txt": "" for n in range(201)}, "201 entries"),
        (beir(corpus="\n".join(json.dumps({"_id": str(n), "text": "x"}) for n in range(5001)),
              qrels="query-id\tcorpus-id\tscore\nq1\t1\t1\n"), "5,001 documents; at most 5,000"),
    ],
)  # fmt: skip
def test_archives_that_hold_no_judged_set_are_refused_in_words(tmp_path, files, words):
    with pytest.raises(RefusedError, match=words):
        read_judged(pack(tmp_path / "set.zip", files), LIMITS)


def test_a_zip_bomb_is_refused_whatever_it_says_of_its_size(tmp_path):
    bomb = pack(tmp_path / "bomb.zip", beir(corpus=b" " * 100_000_000))
    assert bomb.stat().st_size < 200_000
    with pytest.raises(RefusedError, match="unpacks to more than 20 MB"):
        read_judged(bomb, LIMITS)
    # The same, with every size in its directory said to be 10 bytes.
    data = bytearray(bomb.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<I", data, at + 24, 10)
        at = data.find(b"PK\x01\x02", at + 4)
    bomb.write_bytes(bytes(data))
    with pytest.raises(RefusedError):
        read_judged(bomb, LIMITS)


def test_archives_of_archives_are_not_opened_and_paths_lead_nowhere(tmp_path):
    inner = io.BytesIO()
    pack(inner, {"corpus.jsonl": " " * 10_000_000})
    files = {"nested.zip": inner.getvalue(), "../../outside.txt": "x", "/etc/corpus.txt": "x", **beir()}
    before = sorted(tmp_path.rglob("*"))
    path = pack(tmp_path / "set.zip", files)
    assert read_judged(path, LIMITS).queries == {"q1": "tide"}
    assert sorted(tmp_path.rglob("*")) == [*before, path] and not (tmp_path.parent / "outside.txt").exists()


def test_damaged_and_encrypted_archives_are_refused(tmp_path):
    whole = pack(tmp_path / "set.zip", beir(corpus=json.dumps({"_id": "d1", "text": "tide " * 400})))
    data = whole.read_bytes()
    for cut in (data[:10], data[:-30], b"PK", b"", data[:80] + b"\x00" * 60 + data[140:]):
        with pytest.raises(RefusedError):
            read_judged(write(tmp_path, "cut.zip", cut), LIMITS)
    locked = bytearray(data)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = locked.find(signature)
        while at >= 0:
            locked[at + offset] |= 1
            at = locked.find(signature, at + 4)
    with pytest.raises(RefusedError, match="encrypted"):
        read_judged(write(tmp_path, "locked.zip", bytes(locked)), LIMITS)


@pytest.mark.parametrize("row", ['"text"', '{"query": 1}', '{"query": "a", "positive": [1]}', '{"positive": ["a"]}'])
def test_rows_of_another_kind_are_refused(tmp_path, row):
    with pytest.raises(RefusedError, match="Row 1 is not"):
        read_judged(write(tmp_path, "a.jsonl", row), LIMITS)
