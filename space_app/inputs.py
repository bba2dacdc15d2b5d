"""Pasted text and dropped files become documents, or a judged set. Archives are read in memory, within limits.

What files hold is read by `querit.text`, as everywhere; here are the limits, and refusals that name no folder.
"""

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from querit.decoding import json_lines
from querit.text import (
    SUFFIXES,
    TEXT,
    as_text,
    clean,
    document_of,
    is_litter,
    joined,
    of_one_value,
    read_judgements,
    read_lines,
    read_rows,
    suffix_of,
)
from space_app.limits import Limits, RefusedError

SEPARATORS = ("line", "paragraph", "section")
SECTION = "%%%"  # a line of its own between two documents that may hold blank lines themselves
DOCUMENT_FILES = (*sorted(SUFFIXES - {""}), ".gz")
JUDGED_FILES = (".zip", ".jsonl")
MOST_ENTRIES = 200  # of an archive
BEIR = "pack a BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv)."


def split_documents(text: object, separator: str) -> list[str]:
    """Blank ones are left out."""
    if not isinstance(text, str):
        raise RefusedError("The documents must be text.")
    lines = text.splitlines() if separator != "line" else text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if separator == "line":
        return [line.strip() for line in lines if line.strip()]
    if separator not in SEPARATORS:
        raise RefusedError(f"A document is a {', a '.join(SEPARATORS)}.")
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == (SECTION if separator == "section" else ""):
            blocks.append([])
        else:
            blocks[-1].append(line)
    return [document for block in blocks if (document := "\n".join(block).strip())]


def join_documents(documents: list[str]) -> tuple[str, str]:
    """-> text and separator that `split_documents` makes these documents of, but for blanks at their ends."""
    for separator, between in (("line", "\n"), ("paragraph", "\n\n"), ("section", f"\n{SECTION}\n")):
        text = between.join(documents)
        if split_documents(text, separator) == [document.strip() for document in documents if document.strip()]:
            return text, separator
    return text, "section"


@contextmanager
def refused_in_words() -> Iterator[None]:
    """What `querit.text` raises says what is wrong and where; there are no options here that it could name."""
    try:
        yield
    except RefusedError:
        raise
    except ValueError as error:
        raise RefusedError(str(error).replace(" (--column)", "")) from None


@dataclass(frozen=True)
class Table:
    """The rows of one file or several, with their places, and the columns that hold text. Plain text has none."""

    columns: list[str]
    rows: list[tuple[str, Any]]

    @property
    def likely_column(self) -> str:
        """`text` where there is one, else the column with the longest texts."""
        for name in ("text", "document", "content", "body"):
            if name in self.columns or not self.columns:
                return name
        return max(self.columns, key=lambda name: sum(len(str(row.get(name, ""))) for _, row in self.rows))

    def documents(self, column: str) -> list[str]:
        """Title and text joined as everywhere; those without text are left out."""
        if self.columns and column not in self.columns:
            raise RefusedError("The file has no such column; choose another one.")
        with refused_in_words():
            texts = [joined(document_of(row, place, column)) for place, row in self.rows]
        return [clean(text) for text in texts if text.strip()]


ROW_BYTES = 100  # a row counts so much more than its text: many short ones take a hundred times their size


def read_table(paths: str | list[str], separator: str, limits: Limits) -> Table:
    """The documents of what was dropped. One text file is split as asked; of several, each text is a document."""
    paths = [paths] if isinstance(paths, str | Path) else paths
    kept = [Path(path) for path in paths if not is_litter(Path(path).name)]
    check_size(kept, limits)
    rows: list[tuple[str, Any]] = []
    left = limits.unpacked_bytes
    with refused_in_words():
        for path in kept:
            found = []
            with path.open("rb") as file:
                for place, row in read_rows(file, path.name, whole_text=True, most_bytes=limits.file_bytes):
                    left -= ROW_BYTES + len(str(row))
                    if left < 0:
                        raise RefusedError(f"At most {limits.unpacked_bytes / 1e6:g} MB of rows are read, unpacked.")
                    found.append((place, row))
            if len(kept) == 1 and suffix_of(path.name) in TEXT:
                found = [(place, text) for place, whole in found for text in split_documents(whole, separator)]
            rows += found
    objects = [row for _, row in rows if isinstance(row, dict)]
    columns = list(dict.fromkeys(name for row in objects for name, value in row.items() if holds_text(value)))
    if not rows or (objects and not columns):
        raise RefusedError("There are no documents in this file." if len(kept) == 1 else "There are no documents.")
    return Table(columns if len(objects) == len(rows) else [], rows)


def holds_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def check_size(paths: list[Path], limits: Limits) -> None:
    size = sum(path.stat().st_size for path in paths)
    if size > limits.file_bytes:
        what = "The file has" if len(paths) == 1 else "The files have"
        raise RefusedError(f"{what} {size / 1e6:.1f} MB; the limit is {limits.file_bytes / 1e6:g} MB.")


@dataclass(frozen=True)
class JudgedSet:
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, list[str]] = field(default_factory=dict)  # of each query; none: found by BM25


def read_judged(path: str | Path, limits: Limits) -> JudgedSet:
    """A BEIR folder as .zip, or JSONL with a `query`, `positive` and `negative` texts a line. Raises RefusedError."""
    path = Path(path)
    if path.suffix.lower() not in JUDGED_FILES:
        raise RefusedError(f"Files of this type are not read; take one of {', '.join(JUDGED_FILES)}.")
    check_size([path], limits)
    with refused_in_words():
        if path.suffix.lower() == ".zip":
            judged = judged_of_beir(unpack(path.read_bytes(), limits))
        else:
            judged = judged_of_rows(rows_of(path.read_bytes(), path.name))
    if not judged.qrels:
        raise RefusedError("The set has no query with a relevant document.")
    if len(judged.corpus) > limits.judged_documents:
        raise RefusedError(
            f"The set has {len(judged.corpus):,} documents; the limit here is {limits.judged_documents:,}. "
            "`querit evaluate` on your own machine takes any number."
        )
    return judged


def rows_of(data: bytes, name: str) -> list[tuple[str, Any]]:
    """(place, row) of JSON lines."""
    return [(f"{name}:{number}", row) for number, row in json_lines(read_lines(io.BytesIO(data), name), name)]


def unpack(data: bytes, limits: Limits) -> dict[str, bytes]:
    """Name -> content of the files that a BEIR folder has. Nothing is written to disk.

    What an archive says of its sizes may be false: no more is read than the limit allows.
    """
    files: dict[str, bytes] = {}
    left = limits.unpacked_bytes
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if not is_litter(entry.filename)]
            if len(entries) > MOST_ENTRIES:
                raise RefusedError(f"The archive has {len(entries):,} entries; a BEIR folder has a handful.")
            for entry in entries:
                if (name := beir_name(entry.filename)) is None:
                    continue
                if entry.flag_bits & 1:
                    raise RefusedError("The archive is encrypted; pack it without a password.")
                if name in files:
                    raise RefusedError(f"The archive has two files {name}: pack one BEIR folder alone.")
                with archive.open(entry) as file:
                    files[name] = file.read(left + 1)
                left -= len(files[name])
                if left < 0:
                    raise RefusedError(
                        f"The archive unpacks to more than {limits.unpacked_bytes / 1e6:g} MB; that is refused."
                    )
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, UnicodeDecodeError) as error:
        raise RefusedError("The file is no .zip archive that can be read.") from error
    except (zlib.error, lzma.LZMAError) as error:
        raise RefusedError("The archive is damaged.") from error
    return files


def beir_name(path: str) -> str | None:
    """`corpus.jsonl`, `queries.jsonl` or `qrels/*.tsv`, in whatever folder; None for other files."""
    *folders, name = re.split(r"[/\\]", path)  # Windows' archives part by \
    if name in ("corpus.jsonl", "queries.jsonl"):
        return name
    return f"qrels/{name}" if folders[-1:] == ["qrels"] and name.endswith(".tsv") else None


def judged_of_beir(files: dict[str, bytes]) -> JudgedSet:
    for name in ("corpus.jsonl", "queries.jsonl"):
        if name not in files:
            raise RefusedError(f"The archive has no {name}: {BEIR}")
    splits = sorted(name for name in files if name.startswith("qrels/"))
    if not splits:
        raise RefusedError(f"The archive has no qrels/test.tsv: {BEIR}")
    corpus, queries = (
        of_one_value(((row["_id"], clean(joined(row))) for row in documents_of(files[name], name)), name)
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    split = "qrels/test.tsv" if len(splits) > 1 else splits[0]
    if split not in splits:
        raise RefusedError(f"The archive has {' and '.join(splits)}: name the one to measure qrels/test.tsv.")
    judged = read_judgements(read_lines(io.BytesIO(files[split]), split), split)
    qrels = {query: documents for query, documents in judged.items() if query in queries}
    return with_relevant(queries, corpus, qrels, {})


def documents_of(data: bytes, name: str) -> Iterator[dict]:
    for place, row in rows_of(data, name):
        document = document_of(row, place)
        if not document["_id"]:
            raise RefusedError(f"{place}: no _id, which every row of a BEIR folder has.")
        yield document


def judged_of_rows(rows: list[tuple[str, Any]]) -> JudgedSet:
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    numbers: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for key, (place, row) in enumerate(rows, 1):
        query, positive, negative = judged_row(place, row)
        queries[str(key)] = query
        own = qrels.setdefault(str(key), {})
        for score, texts in ((1, positive), (0, negative)):
            for text in texts:
                document = numbers.setdefault(text, f"d{len(numbers)}")
                corpus[document] = text
                if document not in own:
                    own[document] = score
                    candidates.setdefault(str(key), []).append(document)
    return with_relevant(queries, corpus, qrels, candidates)


def judged_row(place: str, row: Any) -> tuple[str, list[str], list[str]]:
    """-> query, relevant texts, others."""
    if not isinstance(row, dict) or "query" not in row:
        raise RefusedError(f'{place} is not {{"query": "...", "positive": ["..."], "negative": ["..."]}}.')
    sides = []
    for name in ("positive", "negative"):
        given = row.get(name) or []
        texts = given if isinstance(given, list) else [given]
        sides.append([clean(as_text(text, place, name)) for text in texts])
    return clean(as_text(row["query"], place, "query")), sides[0], sides[1]


def with_relevant(
    queries: dict[str, str], corpus: dict[str, str], qrels: dict[str, dict[str, int]], candidates: dict[str, list[str]]
) -> JudgedSet:
    """Without the queries that nothing of the corpus answers: whatever the order, they score 0."""
    asked = [
        query
        for query, judged in qrels.items()
        if queries[query].strip() and any(score > 0 and document in corpus for document, score in judged.items())
    ]
    return JudgedSet(
        {query: queries[query] for query in asked},
        corpus,
        {query: qrels[query] for query in asked},
        {query: candidates[query] for query in asked if query in candidates},
    )
