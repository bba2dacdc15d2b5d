"""Reading BEIR folders: `corpus.jsonl`, `queries.jsonl` (either may be gzipped) and `qrels/<split>.tsv`."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What every row must say, as text.
KEYS = {"corpus": ("_id", "text"), "queries": ("_id", "text"), "top_ranked": ("query-id",)}
JUDGED = ("query-id", "corpus-id", "score")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that is half of a character


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line of a JSONL file, gzipped or not, that is not blank.

    Raises ValueError, naming file and line, for what is no JSON or no text, and for an archive that is damaged.
    """
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:  # type: ignore[operator]
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    value = json.loads(line)
                    if SURROGATE.search(line):
                        json.dumps(value, ensure_ascii=False).encode()  # raises where the other half is missing
                    yield number, value
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise ValueError(
                f"{path}, line {number}: {half!a} is half of a character, a lone surrogate. Complete it or take it out."
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged after line {number} ({error}). Fetch it or pack it again.") from error


def read_jsonl(folder: str | Path, name: str) -> Iterator[dict]:
    """Rows of `<folder>/<name>.jsonl` or `.jsonl.gz`. ValueError for one that lacks its id or its text."""
    path = Path(folder) / f"{name}.jsonl"
    packed = Path(f"{path}.gz")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(f"{folder} is no BEIR folder: it has neither {name}.jsonl nor {name}.jsonl.gz.")
    path = path if path.exists() else packed
    for number, row in read_json_lines(path):
        for key in KEYS[name]:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise ValueError(f"{path}, line {number}: no text under `{key}`; every row needs one.")
        yield row


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
    with open(files[0], encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := [name for name in JUDGED if name not in (rows.fieldnames or ())]:
            raise ValueError(
                f"{files[0]}: its first line must name the columns {', '.join(JUDGED)}, with tabs between; "
                f"{', '.join(missing)} is not there."
            )
        for row in rows:
            try:
                qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"{files[0]}, line {rows.line_num}: the score is {row['score']!r}; it must be a whole number."
                ) from None
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
