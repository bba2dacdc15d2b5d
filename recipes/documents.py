"""Reading someone's documents, whatever they are kept in, and telling their language.

A document is `{"_id", "title", "text"}`. What can be read: a BEIR folder, JSONL (also gzipped), CSV or TSV, a folder of
text and Markdown files.
"""

import csv
import itertools
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from markdown_it import MarkdownIt

from recipes.data import read_json_lines

FORMS = "a BEIR folder, a .jsonl, .jsonl.gz, .csv or .tsv file, or a folder of .txt and .md files"
# A short text tells little: with all of the detector's 140 languages in play, noise would choose a rare one.
COMMON_LANGUAGES = {
    "ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "is",
    "it", "ja", "ko", "lt", "lv", "mk", "ms", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sr", "sv", "ta", "th",
    "tr", "uk", "ur", "vi", "zh",
}  # fmt: skip
SHORT = 150  # UTF-8 bytes
RELIABLE = 24  # UTF-8 bytes under which a text's language is not judged
UNDETERMINED = "und"


def stable_hash(*parts: object) -> int:
    """A 64-bit number that depends on nothing but the parts."""
    return int.from_bytes(blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest())


def joined(document: dict) -> str:
    """`{title} {text}`, the title left out where it is empty or already opens the text (as `read_corpus` does)."""
    title, text = document["title"], document["text"]
    return f"{title} {text}" if title and not text.startswith(title) else text


def read_documents(path: str | Path, counts: Counter[str] | None = None) -> Iterator[dict]:
    """Stream the documents of a file or folder; documents without text are left out and counted in `counts["empty"]`.

    JSONL: the text stands under `text`, the id under `_id` or `id` (else the line's number), `title` may be missing.
    CSV and TSV: the same as columns. Text files: the id is the path inside the folder, a Markdown file's first heading
    its title. Raises ValueError for equal ids (after the last document), text that is not UTF-8, rows without text,
    rows of a table that have more fields than columns or quotes out of place, nothing found.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    hashes, empty = array("Q"), 0  # 8 bytes a document, where a set of ids would take a hundred
    try:
        for document in read_all(path):
            if set(document["_id"]) & set("\t\r\n"):
                raise ValueError(f"{path}: the id {document['_id']!r} holds a tab or a line break; give it another.")
            hashes.append(stable_hash(document["_id"]))
            if document["text"].strip() or document["title"]:
                yield document
            else:
                empty += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Convert it: iconv -f ENCODING -t UTF-8") from error
    counts["empty"] += empty
    if len(hashes) == empty:
        raise ValueError(f"{path} has no documents with text. What can be read: {FORMS}.")
    values, times = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    if twice := set(values[times > 1].tolist()):
        first = next(d["_id"] for d in read_all(path) if stable_hash(d["_id"]) in twice)
        raise ValueError(f"{path}: the id {first!r} stands more than once ({len(twice)} such ids); ids must differ.")


def read_all(path: Path) -> Iterator[dict]:
    name = path.name.lower()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. What can be read: {FORMS}.")
    if path.is_dir():
        corpus = [file for file in (path / "corpus.jsonl", path / "corpus.jsonl.gz") if file.exists()]
        return read_all(corpus[0]) if corpus else read_text_files(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return (document_of(row, number, path) for number, row in read_json_lines(path))
    if name.endswith((".csv", ".tsv")):
        return read_table(path, "\t" if name.endswith(".tsv") else ",")
    raise ValueError(f"{path} is of no kind that can be read: {FORMS}.")


def document_of(row: object, number: int, path: Path) -> dict:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(text, str):
        raise ValueError(f"{path}, row {number}: no text under `text`.")
    # 0 is an id too
    key = next((row[k] for k in ("_id", "id") if row.get(k) not in (None, "")), number)
    return {"_id": str(key), "title": str(row.get("title") or "").strip(), "text": text}


def read_table(path: Path, delimiter: str) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KiB that csv expects
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        line = 1  # where a row begins: a quote that is not closed runs on to the end
        try:
            if "text" not in (rows.fieldnames or ()):
                raise ValueError(f"{path} has no column `text`; its columns are {rows.fieldnames}. Rename one.")
            line = rows.line_num + 1
            for number, row in enumerate(rows, 1):
                if None in row:
                    raise ValueError(
                        f"{path}, line {line}: more fields than columns. Put text that holds {delimiter!r} in double "
                        "quotes."
                    )
                yield document_of({**row, "text": row["text"] or ""}, number, path)
                line = rows.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: {error}. A field that begins with a quote must end with one, and quotes inside "
                "it must be doubled."
            ) from error


def read_text_files(folder: Path) -> Iterator[dict]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".txt", ".md") and p.is_file()):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}). Convert it: iconv -f ENCODING -t UTF-8") from error
        title = ""
        if path.suffix.lower() == ".md" and (found := markdown_headings(text)):
            title, start, end = found[0]
            lines = text.splitlines()
            if not "".join(lines[:start]).strip():  # the heading opens the file: it is the title and need not be text
                text = "\n".join(lines[end:])
        yield {"_id": path.relative_to(folder).as_posix(), "title": title, "text": text.strip()}


def markdown_headings(text: str) -> list[tuple[str, int, int]]:
    """(heading without its marks, first line, line after it) of every heading of a Markdown text."""
    tokens = MarkdownIt().parse(text)
    headings = []
    for token, content in itertools.pairwise(tokens):
        if token.type == "heading_open" and token.map:
            plain = "".join(child.content for child in content.children or () if child.content)
            if plain.strip():
                headings.append((plain.strip(), token.map[0], token.map[1]))
    return headings


@cache
def identifier():
    from py3langid.langid import LanguageIdentifier  # its model takes a second to load

    return LanguageIdentifier.from_model_file("data/model.npz.xz", norm_probs=True)


def language_shares(text: str) -> dict[str, float]:
    """ISO 639-1 code -> probability, best first (py3langid; the script alone tells Japanese, Korean and Chinese).

    Empty where there is not a letter.
    """
    text = text[:4000]
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return {}
    for language, script in (("ja", "[\u3041-\u30fa\uff66-\uff9f]"), ("ko", "[\uac00-\ud7a3\u1100-\u11ff]")):
        if len(re.findall(script, text)) > 0.1 * len(letters):
            return {language: 1.0}
    if len(re.findall("[\u3400-\u9fff\uf900-\ufaff]", text)) > 0.3 * len(letters):
        return {"zh": 1.0}
    ranked = identifier().rank(text)
    short = len(text.encode()) < SHORT
    allowed = {code: p for code, p in ranked if (code in COMMON_LANGUAGES if short else len(code) == 2)}
    total = sum(allowed.values())
    return {code: p / total for code, p in allowed.items()}


def detect_language(text: str) -> str:
    """ISO 639-1 code of a text's language; `und` where there is not a letter. Under a few words it is a guess."""
    return next(iter(language_shares(text)), UNDETERMINED)


def is_other_language(text: str, language: str) -> bool:
    """Whether a text is surely not in this language. False where it is too short to tell."""
    if len(text.encode()) < RELIABLE or language == UNDETERMINED:
        return False
    found, probability = next(iter(language_shares(text).items()), (language, 1.0))
    if found == "zh" and language == "ja":
        return False  # Japanese keywords are often written in characters alone
    return found != language and probability >= 0.6
