"""Documents that queries are written for: their ids and their language. How they are read: querit.text."""

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from querit import text

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


def read_documents(path: str | Path, counts: Counter[str] | None = None, column: str = "text") -> Iterator[dict]:
    """As `querit.text.read_documents`, {"_id", "title", "text"} alone, and the ids are such as a qrels file can hold.

    Raises ValueError, besides, for ids with a tab or line break, equal ids (after the last document), nothing found.
    """
    counts = Counter() if counts is None else counts
    hashes = array("Q")  # 8 bytes a document, where a set of ids would take a hundred
    for document in text.read_documents(path, column, counts):
        key = document["_id"]
        if set(key) & set("\t\r\n"):
            raise ValueError(f"{document['source']}: the id {key!r} holds a tab or a line break; give it another.")
        hashes.append(stable_hash(key))
        yield {name: document[name] for name in ("_id", "title", "text")}
    if not hashes:
        also = f" Left out: {text.left_out(counts)}." if text.left_out(counts) else ""
        raise ValueError(f"{path} has no documents with text. What can be read: {text.FORMS}.{also}")
    values, times = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    if twice := set(values[times > 1].tolist()):
        again = (d for d in text.read_documents(path, column) if stable_hash(d["_id"]) in twice)
        first = next(again)
        second = next(d for d in again if d["_id"] == first["_id"])
        raise ValueError(
            f"{second['source']}: the id {first['_id']!r} stands at {first['source']} too ({len(twice)} such ids); ids "
            "must differ."
        )


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
