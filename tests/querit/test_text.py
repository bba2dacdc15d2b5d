"""Files as people have them: read for what they are, or refused with the place and the fix."""

import codecs
import csv
import gzip
import io
import json
import sys
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from querit.markup import markdown_headings, read_html, read_markdown
from querit.text import as_text, document_of, is_litter, joined, left_out, read_documents, read_rows

ROWS = [
    {"_id": "a/1", "title": "Tides", "text": 'The moon pulls the sea.\n"Twice a day", they say.'},
    {"_id": "b", "title": "", "text": "图书馆每天早上九点开门;周末休息。"},
]


def texts(path, column="text", counts=None):
    return [document["text"] for document in read_documents(path, column, counts)]


def plain(documents):
    return [{key: document[key] for key in ("_id", "title", "text")} for document in documents]


def write(path, form):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if form == "beir":
        path.mkdir()
        (path / "corpus.jsonl").write_text("\n" + lines, encoding="utf-8")  # blank lines are no rows
        return path
    file = path.with_suffix(f".{form}")
    kind, packed = file.name.removesuffix(".gz").rpartition(".")[2], form.endswith(".gz")
    if kind in ("jsonl", "ndjson"):
        text = "\ufeff" + lines.replace('"_id"', '"id"')
    elif kind == "json":
        text = json.dumps(ROWS, indent=2)
    else:
        out = io.StringIO(newline="")
        delimiter = {"semicolon": ";", "tab": "\t"}.get(path.name, "\t" if kind == "tsv" else ",")
        table = csv.DictWriter(out, ["title", "text", "_id"], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)
        text = out.getvalue()
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return file


@pytest.mark.parametrize("form", ["beir", "jsonl", "jsonl.gz", "ndjson", "json", "json.gz", "csv", "csv.gz", "tsv"])
def test_every_form_gives_the_same_documents(tmp_path, form):
    assert plain(read_documents(write(tmp_path / "docs", form))) == ROWS


@pytest.mark.parametrize("name", ["semicolon", "tab"])
def test_the_delimiter_of_a_csv_is_found_out(tmp_path, name):
    assert plain(read_documents(write(tmp_path / name, "csv"))) == ROWS


@pytest.mark.parametrize("before", ["\n", "\r\n \n", "sep=;\n", '"sep=;"\r\n', "\nsep=;\n\n"])
def test_lines_before_the_columns_of_a_table_are_none(tmp_path, before):
    (tmp_path / "x.csv").write_bytes(f"{before}text;a,b,c\nrise; and\n".encode())
    (document,) = read_documents(tmp_path / "x.csv")
    line = before.count("\n") + 2
    assert (document["text"], document["source"]) == ("rise", f"{tmp_path}/x.csv:{line}")


def test_a_row_keeps_what_it_came_with_whatever_column_is_read(tmp_path):
    (tmp_path / "x.csv").write_text("id,title,text,body\n7,Tides,short,The whole text\n", encoding="utf-8")
    (document,) = read_documents(tmp_path / "x.csv", "body")
    assert document == {
        "_id": "7",
        "title": "Tides",
        "text": "The whole text",
        "source": f"{tmp_path}/x.csv:2",
        "row": {"id": "7", "title": "Tides", "text": "short", "body": "The whole text"},
    }
    (document,) = read_documents(tmp_path / "x.csv", "title")
    assert joined(document) == "Tides"


def test_a_folder_is_read_with_all_in_it_and_without_litter(tmp_path):
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("# The *kettle*\n\nDescale it.\n", encoding="utf-8")
    (folder / "c.htm").write_text("<title>Pots</title><p>Scour them.", encoding="utf-8")
    (folder / "deep" / "a.txt").write_text("One document\nof two lines.\n", encoding="utf-8")
    (folder / "deep" / "t.csv").write_text("text\nfirst\nsecond\n", encoding="utf-8")
    (folder / "deep" / "o.json").write_text('[{"id": "own", "text": "third"}]', encoding="utf-8")
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "LICENSE").write_text("All rights.", encoding="utf-8")
    for name in (".git/readme.md", "node_modules/x/readme.md", "__MACOSX/._b.md", "._b.md", ".DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07\xff litter")
    (folder / "elsewhere").symlink_to(tmp_path)  # nor round in a circle
    counts = Counter()
    found = list(read_documents(folder, counts=counts))
    pages = [(d["_id"], d["text"]) for d in islice(read_documents(folder, "body"), 2)]  # whose text has but one place
    assert pages == [("b.md", "Descale it."), ("c.htm", "Scour them.")]
    assert [(d["_id"], d["title"], d["text"]) for d in found] == [
        ("b.md", "The kettle", "Descale it."),
        ("c.htm", "Pots", "Scour them."),
        ("deep/a.txt", "", "One document\nof two lines."),
        ("own", "", "third"),
        ("deep/t.csv:1", "", "first"),
        ("deep/t.csv:2", "", "second"),
    ]
    assert [d["source"].removeprefix(f"{folder}/") for d in found][2:] == [
        "deep/a.txt",
        "deep/o.json[0]",
        "deep/t.csv:2",
        "deep/t.csv:3",
    ]
    assert counts == {"empty": 1, "hidden": 5, "other": 2, "links": 1}
    assert left_out(counts) == (
        "1 without text, 5 hidden or a system's own, 2 of kinds that are not read, "
        "1 links to other folders, which can be named themselves"
    )
    assert left_out({}) == ""
    assert is_litter("docs\\__MACOSX\\a.md") and not is_litter("docs/a.b.md") and not is_litter("./a.md")


def test_a_named_text_file_is_a_document_a_line_whatever_ends_them(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeffone\r\ntwo\rthree\n\n four\u2028still four".encode())
    assert [(d["text"], d["source"].rpartition(":")[2]) for d in read_documents(tmp_path / "x.txt")] == [
        ("one", "1"),
        ("two", "2"),
        ("three", "3"),
        ("four\u2028still four", "5"),
    ]


MARKDOWN = """---
title: 'Setting up: the pump'
tags: [a, b]
---

<style>
.x { color: red }

.y {}
</style>
<!-- a note -->

Before you *start*
with both hands
===

Text <b>kept</b>.

```html
<style>kept too</style>
```
"""


def test_markdown_is_a_document_with_its_front_matter_read_as_what_it_is():
    found = read_markdown(MARKDOWN)
    assert found["title"] == "Setting up: the pump"
    assert "tags" not in found["text"] and "red" not in found["text"] and "a note" not in found["text"]
    assert found["text"].endswith("Text <b>kept</b>.\n\n```html\n<style>kept too</style>\n```")
    assert markdown_headings(found["text"])[0][0] == "Before you start with both hands"


@pytest.mark.parametrize(
    ("text", "title", "body"),
    [
        ("---\ntitle: 1917\n---\nBody.", "1917", "Body."),
        ("---\r\ntitle: Pots and pans\r\n---\r\n# Pots and pans\r\n\r\nBody.", "Pots and pans", "Body."),
        ("---\ntitle: Pump: the manual\n---\nBody.", "Pump: the manual", "Body."),
        ("+++\ntitle = 'Hugo'\ndate = 2024-01-02\n+++\nBody.", "Hugo", "Body."),
        ("---\nid: x\n---\n# Heading\nBody.", "Heading", "Body."),
        ("---\ntitle: [" + "[" * 5000 + "\n---\nBody.", "[" * 5001, "Body."),
        ("---\nsidebar.order: 3\ntitle: Dots\n---\nBody.", "Dots", "Body."),
        ("---\n$schema: x\n---\n# Heading\nBody.", "Heading", "Body."),
        ("---\n@id: x\ntitle: No YAML\n---\nBody.", "No YAML", "Body."),
        ("---\nPage name: x\ntitle: Blanks\n---\nBody.", "Blanks", "Body."),
        ("---\nLast updated: 2024-01-01\ntags: [a]\n---\n# Heading\nBody.", "Heading", "Body."),
        ("---\nLast updated: noon: or so\nauthor: me\n---\nBody.", "", "Body."),
        ("---\n\nOne rule: be kind.\n\n---\nBody.", "", "---\n\nOne rule: be kind.\n\n---\nBody."),
        ("---\nTitle: Large\n---\nBody.", "Large", "Body."),
        ("---\n{title: In brackets}\n---\nBody.", "In brackets", "Body."),
        ("# [The *pump*][1]\nBody.\n\n[1]: pump.md", "The pump", "Body.\n\n[1]: pump.md"),
        ("---\nNote: some words\nand more.\n\n---\nBody.", "", "---\nNote: some words\nand more.\n\n---\nBody."),
        ("---\n\nA paragraph\n\n---\n\nBody.", "", "---\n\nA paragraph\n\n---\n\nBody."),
        ("---\ntitle: never closed\n\nBody.", "", "---\ntitle: never closed\n\nBody."),
        ("<style>never closed\n\nBody.", "", "<style>never closed\n\nBody."),
        ("Words first.\n\nThen\na heading\n---\nand more.", "Then a heading", None),
        ("", "", ""),
    ],
)
def test_titles_of_markdown(text, title, body):
    found = read_markdown(text)
    if body is None:  # the heading is the last line of a paragraph: all stays in the text
        assert found["text"] == text
    else:
        assert found == {"title": title, "text": body}


def test_html_is_its_text():
    page = (
        "<html><head><title>Tide &amp; moon</title><style>p {}</style><script>let a = '<p>';</script></head><body>"
        "<h1>Tide &amp; moon</h1><p>The <b>m</b>oon\n pulls.</p><noscript>No.</noscript><ul><li>One<li>Two</ul>"
        "<table><tr><td>a</td><td>b</td></tr></table><svg><title>icon</title></svg>caf&eacute;</body></html>"
    )
    assert read_html(page) == {"title": "Tide & moon", "text": "The moon pulls.\nOne\nTwo\na b\ncafé"}
    assert read_html("<h1>Only a heading</h1>and text") == {"title": "Only a heading", "text": "and text"}
    assert read_html("<p>a <!-- <p>no --> b < c <script>if (a<b) {}</script>d")["text"] == "a b < c d"
    assert read_html("<p>a <!-- never closed")["text"] == "a <!-- never closed"
    assert read_html("<script>let a = '<!--'</script><p>a</p><!-- no --><p>b</p>")["text"] == "a\nb"
    assert read_html("""<a title="1 < 2 <b>" onclick='if (a<b) {}'>a</a> b""")["text"] == "a b"
    assert read_html("<svg><svg></svg><style></style>no</svg>a")["text"] == "a"
    assert read_html("plain") == {"title": "", "text": "plain"}


@pytest.mark.parametrize("piece", ["<!--", "<a ", "<a href='", "</", "<style>\n"])
def test_tags_that_are_never_closed_are_read_in_one_pass(piece):
    """Html.parser by itself looks through all the rest for each: minutes, where this is done at once."""
    assert read_html(f"begin {piece * 30_000}")["text"].startswith("begin")
    assert read_markdown(f"begin\n\n{piece * 300}")["text"].startswith("begin")


@pytest.mark.parametrize("piece", ["[", "![", "[^", "[a](", "_a"])
def test_of_many_marks_a_page_is_read_in_a_moment(piece):
    """Inline marks, read in the text too, would take the square of their number: this test would not end."""
    text = piece * 1_000_000
    assert read_markdown(f"# Title\n\n{text}")["text"] == text
    assert read_markdown(f"# {text}")["title"] == text


def test_tags_that_are_closed_and_never_opened_are_read_in_one_pass():
    assert read_html("a" + "<svg></template>" * 200_000) == {"title": "", "text": "a"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_byte_order_marks_are_honoured(tmp_path, encoding, suffix):
    line = {"txt": "Zugvögel 鸟\n", "csv": "text\r\nZugvögel 鸟\r\n", "jsonl": '{"text": "Zugvögel 鸟"}\n'}[suffix]
    (tmp_path / f"x.{suffix}").write_bytes(line.encode(encoding))
    assert texts(tmp_path / f"x.{suffix}") == ["Zugvögel 鸟"]


def test_numbers_are_their_text_and_missing_values_none(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"id": 7, "title": 1917, "text": 2.5}\n{"id": 0, "title": NaN, "text": "b", "score": -Infinity, "x": 1e999}\n'
    )
    first, second = read_documents(tmp_path / "x.jsonl")
    assert (first["_id"], joined(first)) == ("7", "1917 2.5")
    assert (second["_id"], joined(second)) == ("0", "b")
    assert second["row"] == {"id": 0, "title": None, "text": "b", "score": None, "x": None}


def test_halves_of_characters_become_replacement_characters(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00", "k\\udc00": "\\\\ud83d"}\n')
    (document,) = read_documents(tmp_path / "x.jsonl")
    assert document["row"] == {"text": "a \ufffd b 😀", "k\ufffd": "\\ud83d"}


@pytest.mark.parametrize("content", ['[{"text": "a"}, "b"]', '{"text": "a"}\n{"text": "b"}\n', '"a"\n"b"'])
def test_json_is_an_array_or_values_a_line(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert texts(tmp_path / "x.json") == ["a", "b"]
    (tmp_path / "x.json").write_text('{"text": "a", "id": 1}')
    assert texts(tmp_path / "x.json") == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"x\.jsonl:2: no column 'text'; there is 'body'.*--column"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1: a list, where a text or an object is a document"),
        ("x.jsonl", b'{"text": ["a"]}\n', r"x\.jsonl:1: 'text' is a list; it must be a text or a number"),
        ("x.jsonl", b'{"text": "a", "title": true}\n', r"x\.jsonl:1: 'title' is true or false"),
        ("x.jsonl", b'{"text": "a", "_id": {}}\n', r"x\.jsonl:1: '_id' is an object"),
        ("x.jsonl", b'{"text": "a"}\n{broken\n', r"x\.jsonl:2: no JSON"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl:1: the JSON is nested too deeply"),
        ("x.json", b"[" * 100_000 + b"]" * 100_000, r"x\.json: the JSON is nested too deeply"),
        ("x.json", b'{"text": ' + b"9" * 5000 + b"}", r"x\.json: a number has too many digits"),
        ("x.json", b'[{"text": "a"}, 3]', r"x\.json\[1\]: a number, where"),
        ("x.json", b'[{"text": "a"}', r"x\.json: no JSON"),
        (
            "x.jsonl",
            '{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"),
            r"x\.jsonl:2: not UTF-8.*0xe9, byte 24 ",
        ),
        ("x.csv", "text\n€\n".encode("cp1252"), r"x\.csv:2: not UTF-8 text \(0x80, byte 5 of the file\).*iconv"),
        ("x.txt", codecs.BOM_UTF8 + b"a\n\xff", r"x\.txt:2: not UTF-8 text \(0xff, byte 5"),
        ("x.txt", "words".encode("utf-16-le"), r"x\.txt is no text, or UTF-16 without"),
        ("x.txt", codecs.BOM_UTF16_LE + b"a\x00\n\x00b", r"x\.txt: not UTF-16 text after line"),
        ("x.csv", b"body,id\na,1\n", r"x\.csv:2: no column 'text'; there are 'body', 'id'"),
        (
            "x.csv",
            b"id,text\n1,a\n2,Hello, world, unquoted\n",
            r"x\.csv:3: more fields than columns \(4, not 2\)",
        ),
        ("x.csv", b"id;text\n1;a\n2;Hello; world\n", r"x\.csv:3: more fields than columns.*';'"),
        ("x.csv", b"id,text\n1,line one\nline two\n", r"x\.csv:3: fewer fields than columns \(1, not 2\)"),
        ("x.csv", b'id,text\n1,"a\nb"\n2,"Unclosed\n3,c\n4,d\n', r"x\.csv:4: unexpected end of data.*end with"),
        ("x.csv", b"text,text\na,b\n", r"x\.csv:1: two columns are called 'text'"),
        ("x.tsv", b'id\ttext\n1\t"first" of all\n', r"x\.tsv:2: .*quotes inside it must be doubled"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 5000)[:-20], r"x\.jsonl\.gz is damaged after line \d+"),
        ("x.jsonl.gz", b'{"text": "not packed"}\n', r"x\.jsonl\.gz is damaged after line 0"),
        ("beir/corpus.jsonl", b'\n{"_id": "a", "title": "b"}\n', r"corpus\.jsonl:2: no column 'text'"),
        ("x.pdf", b"%PDF", r"x\.pdf is of no kind that can be read"),
        ("x.xml", b"<a/>", r"x\.xml is of no kind that can be read"),
        ("folder/x.txt", "é".encode("latin-1"), r"folder/x\.txt:1: not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / name.split("/")[0]))


def test_a_missing_path_is_called_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl does not exist"):
        list(read_documents(tmp_path / "nothing.jsonl"))


def test_rows_without_text_are_counted(tmp_path):
    (tmp_path / "x.csv").write_text("title,text\n,\nTides,\n,Rise\n", encoding="utf-8")
    counts = Counter()
    assert [joined(d) for d in read_documents(tmp_path / "x.csv", counts=counts)] == ["Tides ", "Rise"]
    assert counts == {"empty": 1}


def test_uploads_are_read_from_bytes_within_a_limit():
    packed = gzip.compress(b"a" * 1000)
    with pytest.raises(ValueError, match=r"notes\.txt\.gz holds more than"):
        list(read_rows(io.BytesIO(packed), "notes.txt.gz", most_bytes=999))
    rows = list(read_rows(io.BytesIO(packed), "notes.txt.gz", most_bytes=1000))
    assert rows == [("notes.txt.gz:1", "a" * 1000)]


def test_documents_are_streamed(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROWS[0]) + "\n{broken", encoding="utf-8")
    documents = read_documents(tmp_path / "x.jsonl")
    assert plain(islice(documents, 1)) == ROWS[:1]
    with pytest.raises(ValueError, match="jsonl:2"):
        next(documents)


def test_long_fields_of_a_table_are_read(tmp_path):
    (tmp_path / "x.csv").write_text("text\n" + "word " * 50_000 + "\n", encoding="utf-8")
    assert len(texts(tmp_path / "x.csv")[0]) == 250_000


@given(
    st.lists(st.tuples(st.text(), st.text(min_size=1).filter(str.strip)), min_size=1, max_size=5),
    st.sampled_from([",", ";", "\t"]),
)
def test_any_text_comes_back_from_json_and_csv(tmp_path_factory, rows, delimiter):
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"_id": str(n), "title": title.strip(), "text": text} for n, (title, text) in enumerate(rows)]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "x.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    with (folder / "x.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["_id", "title", "text"], delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    for form in ("jsonl", "json", "csv"):
        assert plain(read_documents(folder / f"x.{form}")) == rows


@given(st.binary(max_size=200), st.sampled_from(["txt", "md", "html", "json", "jsonl", "csv", "tsv", "txt.gz"]))
def test_any_bytes_are_read_or_refused_in_words(data, suffix):
    try:
        rows = list(read_rows(io.BytesIO(data), f"x.{suffix}"))
        for place, row in rows:
            json.dumps(document_of(row, place, next(iter(row), "text") if isinstance(row, dict) else "text"))
    except ValueError as error:
        assert str(error).startswith("x.")


def test_every_kind_of_value_has_one_rule():
    assert [as_text(value, "x:1", "title") for value in ("a", 1917, 1.5, None)] == ["a", "1917", "1.5", ""]
    for value in (True, [], {}):
        with pytest.raises(ValueError, match="x:1: 'title' is"):
            as_text(value, "x:1", "title")


def test_the_rule_that_joins_title_and_text_is_the_published_one():
    from modeling_querit.prompting_querit import document_text

    assert joined is document_text and sys.modules["querit.text"].joined is document_text
