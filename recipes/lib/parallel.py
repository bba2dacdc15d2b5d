"""Parallel text: files and folders -> translations, each a mapping of language code -> the same text in it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from querit.text import read_json_lines
from recipes.lib.data import read_jsonl

Translation = dict[str, str]


def read_parallel(path: str | Path) -> Iterator[Translation]:
    """The translations of a JSON Lines file, plain or gzipped.

    A row is `{sl, s, tl, t}` (languages and texts of a pair), `{q: {language: text}}`, `{sents: {language: [text]}}`
    with equally many sentences, or has `title` and `desc` of `{language: text}`. ValueError for any other.
    """
    for number, row in read_json_lines(Path(path)):
        keys = row.keys() if isinstance(row, dict) else set()
        if keys >= {"sl", "s", "tl", "t"}:
            yield {row["sl"]: row["s"], row["tl"]: row["t"]}
        elif "q" in keys:
            yield row["q"]
        elif "sents" in keys:
            languages = list(row["sents"])
            for sentences in zip(*row["sents"].values(), strict=True):
                yield dict(zip(languages, sentences, strict=True))
        elif keys >= {"title", "desc"}:
            yield from (row["title"], row["desc"])
        else:
            raise ValueError(f"{path}:{number}: no row of parallel text; recipes.lib.parallel says which there are.")


def read_aligned(folders: dict[str, str]) -> Iterator[Translation]:
    """Titles, then texts, of BEIR folders (language -> folder) in which an `_id` is the same document in each."""
    rows: dict[str, dict[str, dict]] = {}
    for language, folder in folders.items():
        for row in read_jsonl(folder, "corpus"):
            rows.setdefault(row["_id"], {})[language] = row
    for key in ("title", "text"):
        for versions in rows.values():
            yield {language: row[key] for language, row in versions.items() if row.get(key)}


def read_translations(files: Iterable[str], aligned: dict[str, dict[str, str]]) -> Iterator[Translation]:
    for path in files:
        yield from read_parallel(path)
    for folders in aligned.values():
        yield from read_aligned(folders)


def pairs_with_english(
    translations: Iterable[Translation], languages: list[str], max_characters: int
) -> dict[str, list[tuple[str, str]]]:
    """Language -> its (text, English text), each pair once and sorted, neither text longer than `max_characters`."""
    pairs: dict[str, set[tuple[str, str]]] = {language: set() for language in languages}
    for translation in translations:
        english = translation.get("en")
        if not english or len(english) > max_characters:
            continue
        for language in languages:
            if (text := translation.get(language)) and len(text) <= max_characters:
                pairs[language].add((text, english))
    return {language: sorted(found) for language, found in pairs.items()}
