import json

import pytest

from recipes.fetch import FetchArguments, check, main
from recipes.lib.data import read_corpus, read_qrels, read_queries
from recipes.lib.documents import stable_hash

DOCUMENTS = [{"_id": f"d{n}", "title": "Kettles" if n == 3 else "", "text": f"kettle\tnumber {n}"} for n in range(20)]
QUERIES = [{"_id": f"q{n}", "text": f"the kettle «{n}»"} for n in range(4)]
JUDGED = {"train": [("q0", "d3", 1), ("q0", "d17", 0), ("q1", "d8", 2)], "dev": [("q2", "d5", 1)]}


def write_dataset(folder, prefix=""):
    """A data set as it lies on the Hub: JSON lines and the subsets in its card."""
    folder.mkdir()
    judged = {s: [{"query-id": q, "corpus-id": d, "score": n} for q, d, n in rows] for s, rows in JUDGED.items()}
    for name, rows in {"corpus": DOCUMENTS, "queries": QUERIES, **judged}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = [{"split": split, "path": f"{split}.jsonl"} for split in JUDGED]
    subsets = [
        {"config_name": f"{prefix}qrels" if prefix else "default", "data_files": files},
        {"config_name": f"{prefix}corpus", "data_files": [{"split": "corpus", "path": "corpus.jsonl"}]},
        {"config_name": f"{prefix}queries", "data_files": [{"split": "queries", "path": "queries.jsonl"}]},
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(subsets)}\n---\n", encoding="utf-8")
    return str(folder)


def test_a_data_set_becomes_a_beir_folder(tmp_path):
    entry = {"path": write_dataset(tmp_path / "hub"), "revision": "0" * 40, "split": "train"}
    main(FetchArguments(output_dir=str(tmp_path / "data"), datasets={"kettles": entry}))
    folder = tmp_path / "data" / "kettles"
    assert read_corpus(folder) == {
        d["_id"]: f"{d['title']} {d['text']}" if d["title"] else d["text"] for d in DOCUMENTS
    }
    assert read_queries(folder) == {"q0": "the kettle «0»", "q1": "the kettle «1»"}  # those that the split judges
    assert read_qrels(folder, "train") == {"q0": {"d3": 1, "d17": 0}, "q1": {"d8": 2}}


def test_documents_are_limited_and_judged_ones_kept(tmp_path):
    source = write_dataset(tmp_path / "hub", "fr-")
    entry = {"path": source, "revision": "0" * 40, "split": "dev", "config": "fr", "documents": 6}
    datasets = {"judged": entry, "alone": {**entry, "documents_only": True}}
    main(FetchArguments(output_dir=str(tmp_path / "data"), datasets=datasets))
    by_hash = sorted((d["_id"] for d in DOCUMENTS), key=stable_hash)
    assert set(read_corpus(tmp_path / "data" / "alone")) == set(by_hash[:6])
    assert set(read_corpus(tmp_path / "data" / "judged")) == {"d5", *[d for d in by_hash if d != "d5"][:5]}
    # of a corpus whose queries are for testing nothing else comes along
    assert read_queries(tmp_path / "data" / "alone") == {} and read_qrels(tmp_path / "data" / "alone") == {}
    assert read_qrels(tmp_path / "data" / "judged") == {"q2": {"d5": 1}}


def test_what_is_there_is_not_fetched_again(tmp_path, capsys):
    entry = {"path": write_dataset(tmp_path / "hub"), "revision": "0" * 40, "split": "train"}

    def fetch(**datasets):
        main(FetchArguments(output_dir=str(tmp_path / "data"), datasets=datasets))

    fetch(kettles=entry)
    folder = tmp_path / "data" / "kettles"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    fetch(kettles=entry, more=entry)
    assert "kettles is there already" in capsys.readouterr().out and read_corpus(tmp_path / "data" / "more")
    with pytest.raises(FileExistsError, match=r"kettles is there .* other settings \(split\)"):
        fetch(first=entry, kettles={**entry, "split": "dev"})
    assert not (tmp_path / "data" / "first").exists()  # told before anything is fetched
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_entries_are_checked():
    with pytest.raises(ValueError, match=r"kettles: \['revision'\] must be given"):
        check("kettles", {"path": "a/b"})
    with pytest.raises(ValueError, match=r"unknown keys \['rev'\]"):
        check("kettles", {"path": "a/b", "revision": "x", "rev": "y"})
