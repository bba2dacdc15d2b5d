"""Pasted text and dropped files become documents, or a judged set. Archives are read in memory, within limits."""

import csv
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_querit.prompting_querit import document_text
from space_app.limits import Limits, RefusedError, clean

SEPARATORS = ("line", "paragraph", "section")
SECTION = "%%%"  # a line of its own between two documents that may hold blank lines themselves
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
DOCUMENT_FILES = (".txt", ".md", *TABLES)
JUDGED_FILES = (".zip", ".jsonl")
MOST_ENTRIES = 200  # of an archive


def split_documents(text: object, separator: str) -> list[str]:
    """Blank ones are left out."""
    if not isinstance(text, str):
        raise RefusedError("The documents must be text.")
    lines = text.splitlines() if separator != "line" else text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if separator == "line":
        return [line.strip() for line in lines if line.strip()]
    if separator not in SEPARATORS:
        raise RefusedError(f"Documents are parted by {', '.join(SEPARATORS)}.")
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


@dataclass(frozen=True)
class Table:
    """The rows of a file, and the columns that hold text. Plain text has the single column ""."""

    columns: list[str]
    rows: list[dict[str, str]]

    @property
    def likely_column(self) -> str:
        """`text` where there is one, else the column with the longest texts."""
        for name in ("text", "document", "content", "body"):
            if name in self.columns:
                return name
        return max(self.columns, key=lambda name: sum(len(row.get(name, "")) for row in self.rows))

    def documents(self, column: str) -> list[str]:
        """As the pipeline takes rows of `text` and `title`: `"{title} {text}"`."""
        if column not in self.columns:
            raise RefusedError("The file has no such column; choose another one.")
        titled = column == "text"
        texts = [
            document_text({"text": row.get(column, ""), "title": row.get("title") if titled else None})
            for row in self.rows
        ]
        return [text for text in texts if text.strip()]


def decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RefusedError("The file is not UTF-8 text. Save it as UTF-8 and try again.") from None


def read_bytes(path: str | Path, suffixes: tuple[str, ...], limits: Limits) -> bytes:
    if Path(path).suffix.lower() not in suffixes:
        raise RefusedError(f"Files of this type are not read; take one of {', '.join(suffixes)}.")
    size = Path(path).stat().st_size
    if size > limits.file_bytes:
        raise RefusedError(f"The file has {size / 1e6:.1f} MB; at most {limits.file_bytes / 1e6:g} MB are taken.")
    return Path(path).read_bytes()


def read_table(path: str | Path, separator: str, limits: Limits) -> Table:
    """The documents of a .txt, .md, .jsonl or .csv file. Markdown is parted at blank lines, text as asked."""
    text, suffix = decode(read_bytes(path, DOCUMENT_FILES, limits)), Path(path).suffix.lower()
    if suffix in (".txt", ".md"):
        documents = split_documents(text, "paragraph" if suffix == ".md" else separator)
        table = Table([""], [{"": document} for document in documents])
    elif suffix in (".csv", ".tsv"):
        table = read_csv(text, "\t" if suffix == ".tsv" else ",", limits)
    else:
        table = table_of_objects(read_jsonl(text))
    if not table.rows or not table.columns:
        raise RefusedError("The file holds no documents.")
    return table


def read_csv(text: str, delimiter: str, limits: Limits) -> Table:
    csv.field_size_limit(limits.file_bytes)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", restval="")
        rows = [{name: value for name, value in row.items() if name and isinstance(value, str)} for row in reader]
    except csv.Error as error:
        raise RefusedError(f"The file is no table that can be read: {error}.") from None
    return Table([name for name in reader.fieldnames or [] if name], rows)


def read_jsonl(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError):
                raise RefusedError(f"Line {number} of the file is no JSON.") from None
    return rows


def table_of_objects(objects: list[Any]) -> Table:
    rows: list[dict[str, str]] = []
    for number, item in enumerate(objects, 1):
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, dict):
            raise RefusedError(f"Row {number} of the file is neither a text nor an object.")
        rows.append({clean(name): clean(value) for name, value in item.items() if isinstance(value, str)})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(columns, rows)


@dataclass(frozen=True)
class JudgedSet:
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, list[str]] = field(default_factory=dict)  # of each query; none: found by BM25


def read_judged(path: str | Path, limits: Limits) -> JudgedSet:
    """A BEIR folder as .zip, or JSONL with a `query`, `positive` and `negative` texts a line. Raises RefusedError."""
    data = read_bytes(path, JUDGED_FILES, limits)
    if Path(path).suffix.lower() == ".zip":
        judged = judged_of_beir(unpack(data, limits))
    else:
        judged = judged_of_rows(read_jsonl(decode(data)))
    if not judged.qrels:
        raise RefusedError("The set has no query with a relevant document.")
    if len(judged.corpus) > limits.judged_documents:
        raise RefusedError(
            f"The set has {len(judged.corpus):,} documents; at most {limits.judged_documents:,} are taken here. "
            "`querit evaluate` on your own machine takes any number."
        )
    return judged


def unpack(data: bytes, limits: Limits) -> dict[str, bytes]:
    """Name -> content of the files that a BEIR folder has. Nothing is written to disk.

    What an archive says of its sizes may be false: no more is read than the limit allows.
    """
    files: dict[str, bytes] = {}
    left = limits.unpacked_bytes
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MOST_ENTRIES:
                raise RefusedError(f"The archive has {len(entries):,} entries; a BEIR folder has a handful.")
            for entry in entries:
                parts = Path(entry.filename).parts
                name = "/".join(parts[-2:]) if parts[-2:-1] == ("qrels",) else (parts or ("",))[-1]
                if name not in ("corpus.jsonl", "queries.jsonl") and not (
                    name.startswith("qrels/") and name.endswith(".tsv")
                ):
                    continue
                if entry.flag_bits & 1:
                    raise RefusedError("The archive is encrypted; pack it without a password.")
                with archive.open(entry) as file:
                    files[name] = file.read(left + 1)
                left -= len(files[name])
                if left < 0:
                    raise RefusedError(
                        f"The archive unpacks to more than {limits.unpacked_bytes / 1e6:g} MB; that is refused."
                    )
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError) as error:
        raise RefusedError("The file is no .zip archive that can be read.") from error
    except zipfile.zlib.error as error:  # type: ignore[attr-defined]
        raise RefusedError("The archive is damaged.") from error
    return files


def judged_of_beir(files: dict[str, bytes]) -> JudgedSet:
    splits = sorted(name for name in files if name.startswith("qrels/"))
    if missing := [name for name in ("corpus.jsonl", "queries.jsonl") if name not in files]:
        raise RefusedError(
            f"The archive has no {missing[0]}: pack a BEIR folder (corpus.jsonl, queries.jsonl, qrels/)."
        )
    if not splits:
        raise RefusedError(
            "The archive has no qrels/test.tsv: pack a BEIR folder (corpus.jsonl, queries.jsonl, qrels/)."
        )
    split = "qrels/test.tsv" if "qrels/test.tsv" in splits else splits[0]
    try:
        corpus = {
            str(row["_id"]): clean(document_text({"title": row.get("title") or "", "text": row["text"]}))
            for row in read_jsonl(decode(files["corpus.jsonl"]))
        }
        queries = {str(row["_id"]): clean(row["text"]) for row in read_jsonl(decode(files["queries.jsonl"]))}
        qrels: dict[str, dict[str, int]] = {}
        table = csv.DictReader(io.StringIO(decode(files[split])), delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in table:
            if row["query-id"] in queries:
                qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(
            "The files are not as in a BEIR folder: rows {_id, title, text}, {_id, text}, and a table of query-id, "
            "corpus-id, score."
        ) from None
    return with_relevant(queries, corpus, qrels, {})


def judged_of_rows(rows: list[Any]) -> JudgedSet:
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    numbers: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        query = row.get("query") if isinstance(row, dict) else None
        sides = [row.get(side, []) for side in ("positive", "negative")] if isinstance(row, dict) else []
        sides = [[side] if isinstance(side, str) else side for side in sides]
        if not isinstance(query, str) or not all(
            isinstance(side, list) and all(isinstance(text, str) for text in side) for side in sides
        ):
            raise RefusedError(f'Row {number} is not {{"query": "...", "positive": ["..."], "negative": ["..."]}}.')
        key = str(number)
        queries[key] = clean(query)
        for side, texts in zip((1, 0), sides, strict=True):
            for text in texts:
                document = numbers.setdefault(clean(text), f"d{len(numbers)}")
                corpus[document] = clean(text)
                if document not in qrels.setdefault(key, {}):
                    qrels[key][document] = side
                    candidates.setdefault(key, []).append(document)
    return with_relevant(queries, corpus, qrels, candidates)


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
