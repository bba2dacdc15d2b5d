import pytest

from recipes.data import read_corpus, read_qrels, read_queries, read_texts, read_top_ranked
from tests.recipes.folders_for_tests import small_set


@pytest.mark.parametrize("packed", [False, True])
def test_a_beir_folder_is_read_plain_or_gzipped(tmp_path, packed):
    folder = small_set(tmp_path / "set", packed)
    assert read_corpus(folder)["d1"] == "A tide is kept dry, and a new tide is oiled once a year."
    assert read_queries(folder)["q1"] == "how do I look after a tide"
    assert read_qrels(folder)["q1"] == {"d1": 1}
    assert read_top_ranked(folder) is None
    assert len(list(read_texts(folder))) == len(read_corpus(folder)) + len(read_queries(folder))


def test_titles_stand_before_the_text_once(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "a", "title": "Tides", "text": "They rise."}\n{"_id": "b", "title": "Tides", "text": "Tides rise."}\n'
    )
    assert read_corpus(tmp_path) == {"a": "Tides They rise.", "b": "Tides rise."}


def test_errors_name_the_file_and_the_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither corpus\.jsonl nor"):
        read_corpus(tmp_path)
    (tmp_path / "queries.jsonl").write_text('{"_id": "a", "text": "x"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2"):
        read_queries(tmp_path)
    small_set(tmp_path / "set")
    (tmp_path / "set" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(FileNotFoundError, match="name the split"):
        read_qrels(tmp_path / "set")
    assert read_qrels(tmp_path / "set", "test")["q0"] == {"d0": 1}
