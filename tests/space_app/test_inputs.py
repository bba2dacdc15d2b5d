"""Pasted text and files, harmless and hostile."""

import dataclasses
import gzip
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
JUDGED = "query-id\tcorpus-id\tscore\n"


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
        ("a.txt", "one\ntwo\n", [], "text", ["one", "two"]),
        ("a.md", "---\ntitle: Head\n---\nbody\n\nmore", ["title", "text"], "text", ["Head body\n\nmore"]),
        ("a.html", "<title>T</title><p>a &lt; b</p>", ["title", "text"], "text", ["T a < b"]),
        ("a.csv", 'id,body\n1,"a, b"\n2,c\n', ["id", "body"], "body", ["a, b", "c"]),
        ("a.csv", "id;body\n1;a, b\n", ["id", "body"], "body", ["a, b"]),
        ("a.CSV", "text,title\nrise,Tide\nfall,\n", ["text", "title"], "text", ["Tide rise", "fall"]),
        ("a.tsv", "id\tlong\n1\tthe text\n", ["id", "long"], "long", ["the text"]),
        ("a.json", '["rise", "fall"]', [], "text", ["rise", "fall"]),
        ("a.jsonl", '{"text": "rise", "title": 1917}\n"fall"\n', [], "text", ["1917 rise", "fall"]),
        ("a.jsonl", '\ufeff{"body": "a"}\n\n{"body": ""}\n', ["body"], "body", ["a"]),
    ],
)  # fmt: skip
def test_files_become_documents(tmp_path, name, content, columns, column, documents):
    table = read_table([str(write(tmp_path, name, content))], "line", LIMITS)
    assert table.columns == columns and table.likely_column == column
    assert table.documents(column) == documents
    if columns:
        with pytest.raises(RefusedError, match="no such column"):
            table.documents("evil")


def test_of_several_files_each_text_is_a_document(tmp_path):
    contents = {"a.txt": "one\ntwo", "b.md": "# Head\n\nbody", "._a.txt": "\x00\x05", "c.jsonl": '{"text": "three"}'}
    paths = [str(write(tmp_path, name, content)) for name, content in contents.items()]
    table = read_table(paths, "line", LIMITS)
    documents = table.documents(table.likely_column)
    assert (documents[0], documents[2]) == ("one\ntwo", "three") and "Head" in documents[1] and "body" in documents[1]
    small = dataclasses.replace(LIMITS, file_bytes=30)
    with pytest.raises(RefusedError, match="The files have"):
        read_table(paths, "line", small)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.exe", "MZ", "of no kind that can be read"),
        ("a.txt", b"caf\xe9", "a.txt:1: not UTF-8"),
        ("a.txt", " \n", "no documents"),
        ("a.csv", "", "no documents"),
        ("a.csv", "only,a,head\n", "no documents"),
        ("a.csv", "text,b\nx,y,z\n", "a.csv:2: more fields"),
        ("a.csv", 'text,b\n"x,y\n', "a.csv:2: unexpected end"),
        ("a.jsonl", '{"text": "a"}\n{broken', "a.jsonl:2: no JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: the JSON is nested"),
        ("a.jsonl", "[1, 2]", "a.jsonl:1: a list"),
        ("a.jsonl", '{"n": [1]}', "no documents"),
        ("a.txt", "x" * (LIMITS.file_bytes + 1), "5.0 MB; the limit is 5 MB"),
        ("a.txt.gz", gzip.compress(b"x" * (LIMITS.file_bytes + 1)), "more than 5 MB"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_words(tmp_path, name, content, words):
    with pytest.raises(RefusedError, match=words) as refusal:
        table = read_table([str(write(tmp_path, name, content))], "line", LIMITS)
        table.documents(table.likely_column)
    assert str(tmp_path) not in str(refusal.value)


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


def test_what_is_unpacked_of_several_files_together_has_a_limit(tmp_path):
    paths = [tmp_path / f"{number}.txt.gz" for number in range(3)]
    for path in paths:
        path.write_bytes(gzip.compress(b"tide " * 1000))
    limits = dataclasses.replace(LIMITS, unpacked_bytes=12_000)
    assert len(read_table([str(path) for path in paths[:2]], "line", limits).rows) == 2
    with pytest.raises(RefusedError, match=r"At most 0\.012 MB of rows"):
        read_table([str(path) for path in paths], "line", limits)
    short = write(tmp_path, "short.csv", "text\n" + "a\n" * 200)  # each row of one letter takes far more than that
    with pytest.raises(RefusedError, match=r"At most 0\.012 MB of rows"):
        read_table([str(short)], "line", limits)


@pytest.mark.parametrize("folder", ["", "set/", "a/b/set/", "set\\"])
def test_a_packed_beir_folder_is_read_without_queries_that_nothing_answers(tmp_path, folder):
    files = beir(folder=folder) | {"__MACOSX/set/._corpus.jsonl": "\x00\x05", "__MACOSX/set/corpus.jsonl": "junk"}
    files = {name.replace("/", "\\") if "\\" in folder else name: content for name, content in files.items()}
    judged = read_judged(pack(tmp_path / "set.zip", files), LIMITS)
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
        (beir(corpus='{"id": 1}'), "corpus.jsonl:1: no column 'text'"),
        (beir(corpus='{"text": "a"}'), "corpus.jsonl:1: no _id"),
        (beir(corpus="[]"), "corpus.jsonl:1: a list"),
        (beir(queries='{"_id": "q1", "text": ["a"]}'), "queries.jsonl:1: 'text' is a list"),
        (beir(qrels="query-id\tdocument\tscore\nq1\td1\t1\n"), "its first line must name the columns .* corpus-id is"),
        ({k.replace("test.tsv", f"{split}.tsv"): v for split in ("dev", "train") for k, v in beir().items()},
         "qrels/dev.tsv and qrels/train.tsv: name the one"),
        (beir(qrels=f"{JUDGED}q1\td1\tmany\n"), "qrels/test.tsv:2: the score is 'many'"),
        (beir(qrels=f"{JUDGED}q1\td1\t{2**40}\n"), "a whole number, 1000 at most"),  # ends trec_eval
        (beir(qrels=f"{JUDGED}q1\td1\t1\nq1\td1\t0\n"), "qrels/test.tsv:3: query q1 and document d1"),
        (beir(corpus='{"_id": 1, "text": "a"}\n{"_id": "1", "text": "b"}'), "corpus.jsonl: the id '1' stands"),
        (beir() | beir(folder="other/"), "two files corpus.jsonl"),
        (beir(qrels=f"{JUDGED}q1\td1\t0\n"), "no query with a relevant document"),
        (beir(corpus=b"\xff"), "corpus.jsonl:1: not UTF-8"),
        ({f"{n}.txt": "" for n in range(201)}, "201 entries"),
        (beir(corpus="\n".join(json.dumps({"_id": str(n), "text": "x"}) for n in range(5001)),
              qrels="query-id\tcorpus-id\tscore\nq1\t1\t1\n"), "5,001 documents; the limit here is 5,000"),
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
    packed = pack(tmp_path / "packed.zip", {"corpus.jsonl": "tide " * 400}, compress_type=zipfile.ZIP_LZMA).read_bytes()
    for damaged in (packed[:60] + b"\x00" * 9 + packed[69:], pack(tmp_path / "ü.zip", {"ü": ""}).read_bytes()):
        with pytest.raises(RefusedError, match="archive"):
            read_judged(write(tmp_path, "cut.zip", damaged.replace("ü".encode(), b"\xff\xff")), LIMITS)
    locked = bytearray(data)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = locked.find(signature)
        while at >= 0:
            locked[at + offset] |= 1
            at = locked.find(signature, at + 4)
    with pytest.raises(RefusedError, match="encrypted"):
        read_judged(write(tmp_path, "locked.zip", bytes(locked)), LIMITS)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('"text"', "a.jsonl:1 is not"),
        ('{"positive": ["a"]}', "a.jsonl:1 is not"),
        ('{"query": {}, "positive": ["a"]}', "a.jsonl:1: 'query' is an object"),
        ('{"query": "a", "positive": [[1]]}', "a.jsonl:1: 'positive' is a list"),
    ],
)
def test_rows_of_another_kind_are_refused(tmp_path, row, words):
    with pytest.raises(RefusedError, match=words):
        read_judged(write(tmp_path, "a.jsonl", row), LIMITS)


def test_numbers_are_their_text(tmp_path):
    rows = beir(
        '{"_id": 1, "title": 1917, "text": "tide"}', '{"_id": 7, "text": 1917}', "query-id\tcorpus-id\tscore\n7\t1\t1\n"
    )
    judged = read_judged(pack(tmp_path / "set.zip", rows), LIMITS)
    assert judged.queries == {"7": "1917"} and judged.corpus == {"1": "1917 tide"} and judged.qrels == {"7": {"1": 1}}
