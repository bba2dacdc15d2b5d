"""Groups to train a cross-lingual reranker on: a query and passages in any languages, with their English sides.

Each function here makes the groups of one kind of source. The English side, where there is one, is what a teacher that
reads English alone is asked for: the same question and passages in English. Candidates are found by BM25.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from querit.bm25 import BM25, best_first
from querit.text import joined
from recipes.lib.data import read_jsonl, read_qrels, read_queries
from recipes.lib.names import NAME, in_cyrillic
from recipes.lib.parallel import Translation
from recipes.lib.pieces import START

SENTENCE_ENDS = set(".!?:;\"'“”(")
Dictionary = dict[str, dict[str, list]]  # language -> English word piece -> [[piece of that language, weight], ...]


@dataclass
class Group:
    kind: str
    query: str
    documents: list[str]
    english: tuple[str, list[str]] | None = None  # the query's and the documents' English sides
    relevant: list[bool] = field(default_factory=list)  # all False where it is not known


@dataclass
class Builder:
    """What all kinds of groups need.

    `tokenizer` is a transformers tokenizer; a group has `candidates` passages. `weights` says how often a language is
    drawn beside the others; one that it leaves out has 1.
    """

    tokenizer: Any
    dictionary: Dictionary
    candidates: int
    rng: random.Random
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def languages(self) -> list[str]:
        return sorted(self.dictionary)

    def draw_languages(self, among: list[str], count: int = 1) -> list[str]:
        """So many different ones, by `weights`."""
        among, drawn = list(among), []
        for _ in range(min(count, len(among))):
            drawn += self.rng.choices(among, [self.weights.get(language, 1.0) for language in among])
            among.remove(drawn[-1])
        return drawn

    def negatives(self, found: list[int], depth: int) -> list[int] | None:
        """Draws of the `depth` best found, one fewer than a group has passages; None if there are too few."""
        found = found[:depth]
        return self.rng.sample(found, self.candidates - 1) if len(found) >= self.candidates - 1 else None

    def switched(self, text: str, language: str, share: float) -> str:
        words = self.dictionary[language]
        return switch(text, self.tokenizer.backend_tokenizer, words, share, self.rng, cyrillic=language == "ru")

    def known(self) -> list[bool]:
        return [True] + [False] * (self.candidates - 1)


class Pool:
    """Passages of one language, and those nearest to a query by BM25."""

    def __init__(self, builder: Builder, passages: list[str]):
        self.passages = passages
        self.index = BM25(builder.tokenizer, passages)

    def nearest(self, query: str, top_k: int, without: Iterable[int] = ()) -> list[int]:
        left_out = set(without)
        scores = self.index.scores(query)
        top_k = min(top_k + len(left_out), len(scores))
        best = np.argpartition(-scores, top_k - 1)[:top_k]
        ordered = best[best_first(scores[best])].tolist()
        return [row for row in ordered if row not in left_out]


def switch(
    text: str, tokenizer: Tokenizer, words: dict[str, list], share: float, rng: random.Random, cyrillic: bool = False
) -> str:
    """English text with a share of the words that a dictionary knows replaced, each by one of its translations.

    Training on such text brings languages together (Litschko et al. 2023, "Boosting Zero-shot Cross-lingual Retrieval
    by Training on Artificially Code-Switched Data"). Text without a known word comes back in lower case, as it is read.
    Names that the dictionary does not know are spelt in Cyrillic with `cyrillic`, else left as they are.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spelt: list[str] = []
    for token, following, (begin, end) in zip(
        encoding.tokens, [*encoding.tokens[1:], START], encoding.offsets, strict=False
    ):
        if token.startswith(START) or not spelt:
            start, first = len(spelt), begin
        spelt.append(token)
        if not following.startswith(START):
            continue
        word, pieces = text[first:end].strip(), len(spelt) - start
        # a word that the vocabulary has whole may owe its capital to its place
        inside = start > 0 and spelt[start - 1].strip(START) not in SENTENCE_ENDS
        is_name = word[:1].isupper() and NAME.fullmatch(word) and (pieces > 1 or inside)
        if pieces == 1 and token in words:
            if rng.random() < share:
                meanings, weights = zip(*words[token], strict=True)
                spelt[start:] = rng.choices(meanings, weights)
        elif cyrillic and is_name and rng.random() < share:
            spelt[start:] = [START + in_cyrillic(word, rng)]
    return "".join(spelt).replace(START, " ").strip()


@dataclass
class Judged:
    """A BEIR folder: texts by id, and queries with their relevant ids."""

    passages: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, set[str]]


def read_judged(folder: str, title: bool = True) -> Judged:
    """`title: false` leaves titles out, where they are the queries."""
    rows = {row["_id"]: row for row in read_jsonl(folder, "corpus")}
    passages = {key: joined(row) if title else row["text"] for key, row in rows.items()}
    queries, relevant = read_queries(folder), {}
    for query, found in read_qrels(folder).items():
        positives = {document for document, score in found.items() if score > 0 and document in passages}
        if positives and query in queries:
            relevant[query] = positives
    return Judged(passages, queries, relevant)


def sources(builder: Builder, judged: Judged, most: int) -> Iterator[tuple[str, list[int], list[str]]]:
    """(query, rows of a positive and its negatives, all passages) of at most `most` judged queries.

    One of the negatives comes from farther away: among the nearest alone, words in common would tell nothing.
    """
    ids = list(judged.passages)
    rows = {key: row for row, key in enumerate(ids)}
    pool = Pool(builder, list(judged.passages.values()))
    queries = sorted(judged.relevant)
    for query in builder.rng.sample(queries, min(most, len(queries))):
        positives = [rows[key] for key in sorted(judged.relevant[query])]
        found = pool.nearest(judged.queries[query], 60, positives)
        negatives = builder.negatives(found, 12)
        if negatives is not None:
            negatives[-1] = builder.rng.choice(found[12:] or negatives[-1:])
            yield judged.queries[query], [builder.rng.choice(positives), *negatives], pool.passages


def english_groups(builder: Builder, judged: Judged, most: int) -> Iterator[Group]:
    """English questions: a fifth as they are, the others code-switched, half of these with their passages."""
    rng = builder.rng
    for query, rows, passages in sources(builder, judged, most):
        documents = [passages[row] for row in rows]
        draw, (language,) = rng.random(), builder.draw_languages(builder.languages)
        english = query, documents
        if draw < 0.2:
            yield Group("english", query, documents, english, builder.known())
            continue
        if draw > 0.6:
            other = language if draw < 0.85 else rng.choice(builder.languages)
            documents = [builder.switched(text, other, 0.8) for text in documents]
        yield Group("switched", builder.switched(query, language, 0.9), documents, english, builder.known())


def monolingual_groups(builder: Builder, judged: Judged, most: int) -> Iterator[Group]:
    """Questions and passages of one language, with no English side: what is known of relevance must do."""
    for query, rows, passages in sources(builder, judged, most):
        yield Group("monolingual", query, [passages[row] for row in rows], None, builder.known())


def question_groups(builder: Builder, questions: Iterable[Translation], passages: list[str]) -> Iterator[Group]:
    """The same question in several languages, asked of English passages that it was not written for.

    Nothing is known of relevance: the nearest passage and some of the next may answer or not, as the teacher says.
    """
    pool, rng = Pool(builder, passages), builder.rng
    for question in questions:
        others = sorted(set(question) & set(builder.languages))
        if "en" not in question or not others:
            continue
        first, *rest = pool.nearest(question["en"], 25)
        for language in builder.draw_languages(others, 2):
            negatives = builder.negatives(rest, 24)
            if negatives is None:
                continue
            english = [passages[row] for row in (first, *negatives)]
            documents = english
            if rng.random() < 0.25:
                other = rng.choice(builder.languages)
                documents = [builder.switched(text, other, 0.8) for text in english]
            unknown = [False] * builder.candidates
            yield Group("questions", question[language], documents, (question["en"], english), unknown)


def aligned_groups(builder: Builder, folders: dict[str, Judged], copies: int) -> Iterator[Group]:
    """Headings and their sections, which have equal ids in each language; English must be among the languages.

    Half of the groups have all passages in one language, the others each in any.
    """
    rng, english = builder.rng, folders["en"]
    times = Counter(english.queries.values())
    ids = [
        key
        for key, text in english.passages.items()
        if times[english.queries.get(key, "")] == 1 and len(text) > 60  # a heading that stands twice names no section
    ]
    pool = Pool(builder, [english.passages[key] for key in ids])
    for own, key in enumerate(ids):
        heading = english.queries[key]
        asked = [language for language, folder in folders.items() if key in folder.queries]
        found = [ids[row] for row in pool.nearest(heading, 30, [own])]
        for _ in range(copies if len(asked) > 1 else 0):
            query = folders[rng.choice(asked)].queries[key]
            one = rng.choice([language for language in asked if key in folders[language].passages])
            mixed = rng.random() < 0.5
            near = [other for other in found if mixed or other in folders[one].passages][:15]
            if len(near) < builder.candidates - 1:
                continue
            chosen = [key, *rng.sample(near, builder.candidates - 1)]
            documents = []
            for other in chosen:
                there = [language for language, folder in folders.items() if other in folder.passages]
                documents.append(folders[rng.choice(there) if mixed else one].passages[other])
            passages = [english.passages[other] for other in chosen]
            yield Group("aligned", query, documents, (heading, passages), builder.known())


def sentence_groups(builder: Builder, translations: Iterable[Translation], most: int) -> Iterator[Group]:
    """Sentences: the translation among the nearest others and one far off, in any languages."""
    rng = builder.rng
    versions: dict[str, list[str]] = {}
    for translation in translations:
        english = translation.get("en", "")
        if 20 < len(english) < 250:
            versions.setdefault(english, []).extend(translation[x] for x in builder.languages if x in translation)
    sentences = sorted(english for english, others in versions.items() if others)
    rng.shuffle(sentences)
    pool = Pool(builder, sentences)
    for own, english in enumerate(sentences[:most]):
        near = builder.negatives(pool.nearest(english, 10, [own]), 10)
        if near is None:
            continue
        chosen = [own, *near[1:], rng.randrange(len(sentences))]
        sides = [sentences[row] for row in chosen]
        documents = [side if rng.random() < 0.3 else rng.choice(versions[side]) for side in sides]
        query = rng.choice(versions[english])
        if rng.random() < 0.25:
            query, documents[0] = english, rng.choice(versions[english])
        yield Group("sentences", query, documents, (english, sides), builder.known())


def pooled_groups(builder: Builder, folders: dict[str, Judged]) -> Iterator[Group]:
    """Questions of one language, passages of another: folders in which an id is the same passage in each language."""
    rng = builder.rng
    near = {}
    for language, folder in folders.items():
        ids, pool = list(folder.passages), Pool(builder, list(folder.passages.values()))
        rows = [pool.nearest(text, 8, [own]) for own, text in enumerate(pool.passages)]
        near[language] = {key: [ids[row] for row in found] for key, found in zip(ids, rows, strict=True)}
    for language, folder in folders.items():
        for query, relevant in folder.relevant.items():
            positive = min(relevant)
            for other in (name for name in folders if name != language and positive in folders[name].passages):
                candidates = [key for key in near[other][positive] if key not in relevant]
                if len(candidates) >= builder.candidates - 1:
                    chosen = [positive, *rng.sample(candidates, builder.candidates - 1)]
                    documents = [folders[other].passages[key] for key in chosen]
                    yield Group("pooled", folder.queries[query], documents, None, builder.known())
