"""Reading BEIR folders: `corpus.jsonl`, `queries.jsonl` (either may be gzipped) and `qrels/<split>.tsv`."""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path


def read_jsonl(folder: str | Path, name: str) -> Iterator[dict]:
    """Rows of `<folder>/<name>.jsonl` or `.jsonl.gz`."""
    path = Path(folder) / f"{name}.jsonl"
    packed = Path(f"{path}.gz")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(f"{folder} is no BEIR folder: it has neither {name}.jsonl nor {name}.jsonl.gz.")
    with path.open(encoding="utf-8") if path.exists() else gzip.open(packed, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{folder}/{name}.jsonl, line {number}: {error}") from error


def read_corpus(folder: str | Path) -> dict[str, str]:
    """Document id -> `{title} {text}`, the title left out where it is empty or already opens the text."""
    corpus = {}
    for row in read_jsonl(folder, "corpus"):
        title, text = (row.get("title") or "").strip(), row["text"]
        corpus[row["_id"]] = f"{title} {text}" if title and not text.startswith(title) else text
    return corpus


def read_queries(folder: str | Path) -> dict[str, str]:
    return {row["_id"]: row["text"] for row in read_jsonl(folder, "queries")}


def read_qrels(folder: str | Path, split: str | None = None) -> dict[str, dict[str, int]]:
    """Query id -> {document id: relevance} of one split, or of the only one."""
    files = sorted((Path(folder) / "qrels").glob(f"{split or '*'}.tsv"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder}/qrels has {[f.name for f in files]}; name the split to read.")
    qrels: dict[str, dict[str, int]] = {}
    with open(files[0], encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    return qrels


def read_top_ranked(folder: str | Path) -> dict[str, list[str]] | None:
    """Query id -> candidate ids where the folder lists them, else None."""
    if not (Path(folder) / "top_ranked.jsonl").exists():
        return None
    return {row["query-id"]: row["corpus-ids"] for row in read_jsonl(folder, "top_ranked")}


def read_texts(folder: str | Path) -> Iterator[str]:
    """Every query and document of a folder, as running text."""
    yield from read_queries(folder).values()
    yield from read_corpus(folder).values()
