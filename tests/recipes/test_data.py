import gzip

import pytest

from recipes.lib.data import read_corpus, read_qrels, read_queries, read_top_ranked
from tests.recipes.folders_for_tests import small_set


@pytest.mark.parametrize("packed", [False, True])
def test_a_beir_folder_is_read_plain_or_gzipped(tmp_path, packed):
    folder = small_set(tmp_path / "set", packed)
    assert read_corpus(folder)["d1"] == "A tide is kept dry, and a new tide is oiled once a year."
    assert read_queries(folder)["q1"] == "how do I look after a tide"
    assert read_qrels(folder)["q1"] == {"d1": 1}
    assert read_top_ranked(folder) is None


def test_titles_stand_before_the_text(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "a", "title": "Tides", "text": "They rise."}\n{"_id": "b", "title": "Tides", "text": "Tides rise."}\n'
    )
    assert read_corpus(tmp_path) == {"a": "Tides They rise.", "b": "Tides Tides rise."}


def test_errors_name_the_file_and_the_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither corpus\.jsonl nor"):
        read_corpus(tmp_path)
    (tmp_path / "queries.jsonl").write_text('{"_id": "a", "text": "x"}\n{broken\n')
    with pytest.raises(ValueError, match=r"queries\.jsonl:2: no JSON"):
        read_queries(tmp_path)
    small_set(tmp_path / "set")
    (tmp_path / "set" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(FileNotFoundError, match="name the split"):
        read_qrels(tmp_path / "set")
    assert read_qrels(tmp_path / "set", "test")["q0"] == {"d0": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"_id": "b", "title": "Tides"}', r"corpus\.jsonl:4: no text under `text`"),
        ('{"_id": "b", "text": null}', r"corpus\.jsonl:4: no text under `text`"),
        ('{"_id": "b", "text": ["x"]}', r"corpus\.jsonl:4: 'text' is a list; it must be a text or a number"),
        ('{"_id": true, "text": "x"}', r"corpus\.jsonl:4: '_id' is true or false"),
        ('["b", "x"]', r"corpus\.jsonl:4: no text under `_id`"),
        ("[" * 100_000, r"corpus\.jsonl:4: .*nested too deeply"),
        ('{"_id": "b", "text": ' + "9" * 5000 + "}", r"corpus\.jsonl:4: a number has too many digits"),
    ],
)
def test_rows_that_lack_something_are_told_and_blank_lines_are_none(tmp_path, row, message):
    first = '{"_id": "a", "text": "\\ud83d\\ude00 rises"}\n\n \n'
    (tmp_path / "corpus.jsonl").write_text(first)
    assert read_corpus(tmp_path) == {"a": "😀 rises"}
    (tmp_path / "corpus.jsonl").write_text(f"{first}{row}\n")
    with pytest.raises(ValueError, match=message):
        read_corpus(tmp_path)


def test_an_archive_that_is_cut_short_is_named(tmp_path):
    packed = gzip.compress(b'{"_id": "a", "text": "x"}\n' * 4000)
    (tmp_path / "corpus.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz is damaged after line \d+ .*Fetch it"):
        read_corpus(tmp_path)


def test_numbers_are_their_text_and_halves_of_characters_are_told_from_none(tmp_path):
    rows = '{"_id": 7, "title": 1917, "text": "x \\ud83d"}\n{"_id": 0, "title": NaN, "text": 2.5}\n'
    (tmp_path / "corpus.jsonl").write_text(rows)
    assert read_corpus(tmp_path) == {"7": "1917 x \ufffd", "0": "2.5"}
    (tmp_path / "top_ranked.jsonl").write_text('{"query-id": 1, "corpus-ids": [7, "0"]}\n')
    assert read_top_ranked(tmp_path) == {"1": ["7", "0"]}


def test_a_missing_folder_is_called_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_corpus(tmp_path / "nowhere")


def test_files_of_other_systems_are_no_split(tmp_path):
    folder = small_set(tmp_path / "set")
    (folder / "qrels" / "._test.tsv").write_bytes(b"\x00\x05\x16\x07\xff")
    assert read_qrels(folder)["q1"] == {"d1": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (f"query-id\tcorpus-id\tscore\nq1\td1\t{2**40}\n", r"tsv:2: .* a whole number, 1000 at most"),  # ends trec_eval
        ("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t0\n", r"tsv:3: query q1 and document d1 are judged above too"),
        (b"query-id\tcorpus-id\tscore\nq1\td\xe9\t1\n", r"test\.tsv:2: not UTF-8"),
        ("q1\td1\t1\n", r"test\.tsv: its first line must name the columns query-id, corpus-id, score"),
        ("", "query-id, corpus-id, score is not there"),
        ("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0.5\n", r"test\.tsv:3: the score is '0\.5'"),
        ("query-id\tcorpus-id\tscore\nq1\td1\n", r"tsv:2: the score is None"),
    ],
)
def test_judgements_without_a_header_or_a_score_are_told(tmp_path, lines, message):
    folder = small_set(tmp_path / "set")
    (folder / "qrels" / "test.tsv").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(ValueError, match=message):
        read_qrels(folder)


def test_an_id_of_two_texts_is_refused_and_of_one_text_twice_is_not(tmp_path):
    row = '{"_id": "a", "text": "one"}\n'
    for name, read in (("corpus", read_corpus), ("queries", read_queries)):
        (tmp_path / f"{name}.jsonl").write_text(row * 2)
        assert read(tmp_path) == {"a": "one"}
        (tmp_path / f"{name}.jsonl").write_text(row + row.replace("one", "two"))
        with pytest.raises(ValueError, match=rf"{name}\.jsonl: the id 'a' stands there twice"):
            read(tmp_path)


def test_files_in_utf_16_are_read_as_their_byte_order_mark_says(tmp_path):
    folder = small_set(tmp_path / "set")
    expected = read_qrels(folder)
    path = folder / "qrels" / "test.tsv"
    path.write_bytes(path.read_text().encode("utf-16"))
    assert read_qrels(folder) == expected


def test_candidates_that_are_no_list_are_refused(tmp_path):
    (tmp_path / "top_ranked.jsonl").write_text('{"query-id": "q", "corpus-ids": "d1"}\n')
    with pytest.raises(ValueError, match="query q: corpus-ids must be a list"):
        read_top_ranked(tmp_path)
