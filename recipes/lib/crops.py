"""Queries cut out of a document: its title, headings, most telling words and sentences. Any language, no model."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from itertools import chain, zip_longest

import numpy as np

from querit.markup import markdown_headings
from querit.text import joined
from recipes.lib.queries import CJK, TOKEN, word_count

TERM_TABLE = 2**20  # hashed terms: the table's size does not grow with the corpus
KEYWORDS = 4
SENTENCE_WORDS = (4, 24)  # least and most


def terms(text: str) -> list[str]:
    """What is counted of a text: its words; pairs of characters where words are not parted by spaces."""
    found: list[str] = []
    for run in re.findall(rf"[{CJK}]+|[^\W_{CJK}]+", text.lower()):
        if re.match(f"[{CJK}]", run):
            found += [run[i : i + 2] for i in range(max(1, len(run) - 1))]
        else:
            found.append(run)
    return found


def term_slot(term: str) -> int:
    return zlib.crc32(term.encode()) % TERM_TABLE


def count_terms(texts: Iterable[str]) -> np.ndarray:
    """In how many texts each term stands: int32 `(TERM_TABLE + 1,)`, hashed; the last number is that of the texts."""
    table = np.zeros(TERM_TABLE + 1, np.int32)
    for text in texts:
        table[list({term_slot(term) for term in terms(text)})] += 1
        table[-1] += 1
    return table


def split_sentences(text: str) -> list[str]:
    """Sentences of SENTENCE_WORDS words, of longer ones the clauses."""
    least, most = SENTENCE_WORDS
    spans = []
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text):
        short = word_count(sentence) <= most
        spans += [sentence] if short else re.split(r"[,;:]\s+|[，；：、]|\s[–—-]\s", sentence)
    stripped = (span.strip(" .。,;#*|>\t") for span in spans)
    return list(dict.fromkeys(span for span in stripped if least <= word_count(span) <= most))


def content_words(text: str, language: str) -> list[str]:
    """The words that may be keywords. None for Chinese, where nothing marks a word."""
    if language == "zh":
        return []
    if language == "ja":  # a run of characters or of katakana is mostly one word
        return re.findall(r"[\u4e00-\u9fff々]{2,8}|[ァ-ヺー]{3,}|[A-Za-z]{3,}", text)
    return [word for word in TOKEN.findall(text) if len(word) > (1 if language == "ko" else 2) and word.isalpha()]


class CropGenerator:
    """At most `count` crops a document. `term_table` is a file of `count_terms` over documents of the corpus."""

    def __init__(self, count: int, term_table: str):
        self.count = count
        table = np.load(term_table, allow_pickle=False)
        self.idf = np.log((1 + table[-1]) / (1 + table[:-1]))

    def weights(self, text: str) -> dict[str, float]:
        """tf-idf of a text's terms: (1 + ln tf) ln((1 + n) / (1 + df)) (Salton and Buckley 1988, smoothed)."""
        return {t: (1 + np.log(tf)) * float(self.idf[term_slot(t)]) for t, tf in Counter(terms(text)).items()}

    def crops(self, item: dict) -> list[tuple[str, str, str]]:
        text, language = item["text"], item["language"]
        weights = self.weights(joined(item))

        def telling(span: str) -> float:
            found = terms(span)
            return -sum(weights.get(term, 0.0) for term in found) / max(1, len(found))

        words: dict[str, str] = {}
        for word in content_words(text, language):
            words.setdefault(word.lower(), word)
        best = sorted(words, key=telling)[:KEYWORDS]
        keywords = " ".join(shape for word, shape in words.items() if word in best) if len(best) > 1 else ""
        sentences = [("sentence", span) for span in sorted(split_sentences(text), key=telling)]
        headings = [("heading", span) for span, _, _ in markdown_headings(text)] if "#" in text else []
        turns = chain.from_iterable(zip_longest(sentences, headings))
        found = [("title", item["title"]), ("keywords", keywords), *(turn for turn in turns if turn)]
        return [(kind, query, "") for kind, query in found if query][: self.count]

    def queries(self, items: list[dict]) -> list[list[tuple[str, str, str]]]:
        return [self.crops(item) for item in items]
