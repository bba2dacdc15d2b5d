"""Documents as people keep them: the one reader behind the command line, the recipes and the Space.

    .txt, .text, .log, no suffix   a document a line where the file is named, one document where it lies in a folder
    .md, .markdown, .html, .htm    one document, its title that of the front matter, `<title>` or first heading
    .json                          an array's elements; or as .jsonl
    .jsonl, .ndjson                a document a line: a string, or an object whose text stands under a column's name
    .csv, .tsv                     a document a row

Each may be packed (.gz). A folder is read with all in it; a BEIR folder is its corpus. Text is UTF-8, or UTF-16 or
UTF-32 with a byte order mark. What cannot be read is refused with its place: nothing is cut or guessed in silence.
"""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# The one rule by which title and text join is published beside the weights: training and serving read the same.
from modeling_querit.prompting_querit import document_text as joined
from querit.decoding import clean, json_lines, parse_json, read_json_lines, read_lines
from querit.markup import read_html, read_markdown
from querit.tables import DELIMITERS, read_table

__all__ = [
    "FORMS",
    "as_judgement",
    "as_text",
    "clean",
    "column_of_numbers",
    "document_of",
    "is_litter",
    "joined",
    "left_out",
    "of_one_value",
    "read_documents",
    "read_json_lines",
    "read_lines",
    "read_rows",
]

TEXT = ("", ".txt", ".text", ".log")
PAGES = {".md": read_markdown, ".markdown": read_markdown, ".html": read_html, ".htm": read_html, ".xhtml": read_html}
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = frozenset((*TEXT, *PAGES, ".json", *JSON_LINES, *DELIMITERS))
FORMS = (
    "text (.txt), Markdown (.md), HTML (.html), JSON (.json, .jsonl, .ndjson), tables (.csv, .tsv), each also packed "
    "(.gz), or a folder of them"
)
JUDGED = ("query-id", "corpus-id", "score")  # columns of a qrels file
HIGHEST_JUDGEMENT = 1000  # trec_eval keeps a table of all up to the highest; far beyond that it ends the process
# What systems and tools leave beside documents; hidden names (`.git`, `.DS_Store`, `._notes.md`) begin with a dot.
LITTER = {"__MACOSX", "__pycache__", "node_modules", "$RECYCLE.BIN", "System Volume Information"}


def is_litter(name: str) -> bool:
    """Whether a path inside a folder or archive is hidden, or another system's. Windows' archives part by `\\`."""
    return any(part in LITTER or part.startswith(".") for part in re.split(r"[/\\]", name) if part != ".")


def suffix_of(name: str) -> str:
    """The suffix that says what a file holds: of `a.csv.gz` it is `.csv`."""
    return Path(name.lower().removesuffix(".gz")).suffix


def read_documents(path: str | Path, column: str = "text", counts: Counter[str] | None = None) -> Iterator[dict]:
    """Stream the documents of a file or folder: {"_id", "title", "text", "source", "row"}.

    `_id` is the row's `_id` or `id`, else its place: the number of the row, the path inside the folder. `source` is
    `file:line`, `file[index]` or the file. `row` is the string or mapping as it came. Rows without any text, and a
    folder's files that are hidden or of other kinds, are left out and counted in `counts` (see `left_out`).

    Raises FileNotFoundError for a path that is not there, ValueError with the place for all that cannot be read.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_dir():
        yield from _read_file(path, "", column, counts)
        return
    corpus = [path / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).exists()]
    if corpus:
        yield from read_documents(corpus[0], column, counts)
        return
    for name in files_of(path, counts):
        yield from _read_file(path / name, name, column, counts)


def _read_file(path: Path, inside: str, column: str, counts: Counter[str]) -> Iterator[dict]:
    """The documents of a file that have text; `inside` is its path in the folder that is read, "" if it is named."""
    page = suffix_of(path.name) in PAGES
    with path.open("rb") as file:
        rows = read_rows(file, str(path), column, whole_text=bool(inside))
        for number, (place, row) in enumerate(rows, 1):
            key = clean(inside) if place == str(path) else f"{clean(inside)}:{number}".removeprefix(":")
            document = document_of(row, place, "text" if page else column, key or str(number))
            if joined(document).strip():
                yield document
            else:
                counts["empty"] += 1


def files_of(folder: Path, counts: Counter[str]) -> list[str]:
    """The paths, inside a folder, of the files that can be read, in order; the others are counted."""

    def stop(error: OSError) -> None:  # by itself walk passes over folders that may not be read
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=stop):
        counts["links"] += sum(Path(parent, name).is_symlink() for name in folders if not is_litter(name))
        counts["hidden"] += sum(map(is_litter, (*folders, *files)))
        folders[:] = [name for name in folders if not is_litter(name)]
        for name in files:
            path = Path(parent, name)
            # In a folder, files without suffix are licences and scripts more often than documents.
            readable = suffix_of(name) in SUFFIXES - {""} and path.is_file()
            if not is_litter(name) and not readable:
                counts["other"] += 1
            elif not is_litter(name):
                found.append(path.relative_to(folder))
    return [path.as_posix() for path in sorted(found)]


def left_out(counts: Mapping[str, int]) -> str:
    """What `read_documents` counted, in words; "" where all was read."""
    words = {
        "empty": "without text",
        "hidden": "hidden or a system's own",
        "other": "of kinds that are not read",
        "links": "links to other folders, which can be named themselves",
    }
    return ", ".join(f"{counts[key]} {words[key]}" for key in words if counts.get(key))


def document_of(row: Any, place: str, column: str = "text", key: str = "") -> dict:
    """A row as a document; `key` is its id where it has none. See `read_documents`.

    Numbers become their text, null and a title that is not there an empty one. ValueError, naming the place, for rows
    that are neither text nor object, without the column, or with a list, an object or a truth value for a text.
    """
    if isinstance(row, str):
        return {"_id": key, "title": "", "text": row, "source": place, "row": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: {_kind(row)}, where a text or an object is a document.")
    if column not in row:
        raise ValueError(
            f"{place}: no column {column!r}; there {'are' if len(row) > 1 else 'is'} "
            f"{', '.join(map(repr, row)) or 'none'}. Choose the one that holds the text (--column)."
        )
    name = next((name for name in ("_id", "id") if row.get(name) not in (None, "")), None)
    return {
        "_id": key if name is None else as_text(row[name], place, name),
        "title": "" if column == "title" else as_text(row.get("title"), place, "title").strip(),
        "text": as_text(row[column], place, column),
        "source": place,
        "row": row,
    }


def as_text(value: Any, place: str, name: str) -> str:
    """A field's text. Numbers become theirs, null an empty one; ValueError for anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{place}: {name!r} is {_kind(value)}; it must be a text or a number.")


def as_judgement(value: Any, place: str) -> int:
    """A score of a qrels file. ValueError, naming the place, for what is none."""
    try:
        score = int(value)
    except (TypeError, ValueError):
        score = HIGHEST_JUDGEMENT + 1
    if abs(score) > HIGHEST_JUDGEMENT:
        raise ValueError(f"{place}: the score is {value!r}; it must be a whole number, {HIGHEST_JUDGEMENT} at most.")
    return score


def read_judgements(lines: Iterable[str], name: str) -> dict[str, dict[str, int]]:
    """Query id -> {document id: score} of a qrels file of BEIR. ValueError, with the place, for what is none.

    Ids are read as they stand: a quote is part of one.
    """
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := [column for column in JUDGED if column not in (rows.fieldnames or ())]:
        raise ValueError(
            f"{name}: its first line must name the columns {', '.join(JUDGED)}, with tabs between; "
            f"{', '.join(missing)} is not there."
        )
    judgements: dict[str, dict[str, int]] = {}
    for row in rows:
        place, query, document = f"{name}:{rows.line_num}", row["query-id"], row["corpus-id"]
        score = as_judgement(row["score"], place)
        if judgements.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(
                f"{place}: query {query} and document {document} are judged above too, otherwise. Keep one of the two "
                "lines."
            )
    return judgements


def of_one_value(pairs: Iterable[tuple[str, Any]], name: str) -> dict[str, Any]:
    """Id -> its value. ValueError, naming the file, for an id of two values, one of which would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{name}: the id {key!r} stands there twice, and not for the same; ids must differ.")
    return found


def column_of_numbers(documents: list[dict], name: str) -> list[float]:
    """What stands under a name in the rows of documents, one finite number each. ValueError, naming the place."""
    numbers = []
    for document in documents:
        row = document["row"]
        value = row.get(name) if isinstance(row, Mapping) else None
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{document['source']}: no number under {name!r}.")
        numbers.append(number)
    return numbers


def _kind(value: Any) -> str:
    names = {bool: "true or false", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


def read_rows(
    file: BinaryIO, name: str, column: str | None = None, *, whole_text: bool = False, most_bytes: int | None = None
) -> Iterator[tuple[str, Any]]:
    """(place, row) of all that a file holds: a string, or a mapping of columns; see the head of this file.

    `name` tells by its suffix what it holds. With `whole_text` a text file is one document. `column` helps to find a
    table's delimiter. More than `most_bytes`, unpacked, are refused. Raises ValueError with the place.
    """
    suffix = suffix_of(name)
    if suffix not in SUFFIXES:
        raise ValueError(f"{name} is of no kind that can be read. Save it as one of these: {FORMS}.")
    lines = read_lines(file, name, most_bytes)
    if suffix in PAGES:
        yield name, PAGES[suffix]("".join(lines))
    elif suffix in TEXT and whole_text:
        yield name, "".join(lines).strip()
    elif suffix in TEXT:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{name}:{number}", line.strip()
    elif suffix in DELIMITERS:
        yield from read_table(lines, name, suffix, column)
    elif suffix in JSON_LINES:
        yield from ((f"{name}:{number}", row) for number, row in json_lines(lines, name))
    else:
        yield from _read_json(list(lines), name)


def _read_json(lines: list[str], name: str) -> Iterator[tuple[str, Any]]:
    """An array's elements, a single object, or, under the wrong name, objects a line."""
    text = "".join(lines)
    if not text.strip():
        return
    try:
        value = parse_json(text, name)
    except ValueError:
        first = next(line for line in lines if line.strip())
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            pass
        else:  # several values: objects a line
            yield from ((f"{name}:{number}", row) for number, row in json_lines(lines, name))
            return
        raise
    if isinstance(value, list):
        yield from ((f"{name}[{index}]", row) for index, row in enumerate(value))
    else:
        yield name, value
