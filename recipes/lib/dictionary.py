"""What other languages' pieces mean in English ones: from parallel text, and from a multilingual encoder's words."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import normalize

Sentence = list[int]  # piece ids


@dataclass
class Alignment:
    """Foreign and English pieces that stand in one pair of sentences at least, each array `(entries,)`."""

    foreign: np.ndarray  # id
    english: np.ndarray  # id
    probability: np.ndarray  # t(english | foreign)
    count: np.ndarray  # how often the foreign piece is expected to have brought the English one about


def ibm_model_1(pairs: list[tuple[Sentence, Sentence]], iterations: int, smoothing: float = 0.02) -> Alignment:
    """Lexical translation probabilities by expectation maximisation from (foreign, English) sentences.

    IBM Model 1 (Brown et al. 1993, "The mathematics of statistical machine translation"): each English piece comes from
    one foreign piece of its pair, or from none (NULL, left out of what is returned). `smoothing` is added to a foreign
    piece's count when it is divided by, so that a piece seen once is not sure of anything.
    """
    pairs = [(foreign, english) for foreign, english in pairs if foreign and english]
    # Every (foreign, English) couple of positions; foreign ids are moved up by one, and 0 is NULL.
    foreign = [np.tile(np.array([*f, -1], np.int64) + 1, len(e)) for f, e in pairs]
    english = [np.repeat(np.array(e, np.int64), len(f) + 1) for f, e in pairs]
    positions = np.repeat(np.arange(sum(len(e) for _, e in pairs)), [len(f) + 1 for f, e in pairs for _ in e])
    size = 1 + max((max(e) for _, e in pairs), default=0)
    keys, places = np.unique(
        np.concatenate(foreign or [np.empty(0, np.int64)]) * size + np.concatenate(english or [np.empty(0, np.int64)]),
        return_inverse=True,
    )
    of, to = keys // size, keys % size
    probability: np.ndarray = np.ones(len(keys))
    count: np.ndarray = probability
    for _ in range(iterations):
        share = probability[places]
        share /= np.bincount(positions, share)[positions]
        count = np.bincount(places, share, len(keys))
        probability = count / (np.bincount(of, count)[of] + smoothing)
    real = of > 0
    return Alignment(of[real] - 1, to[real], probability[real], count[real])


@dataclass
class Lexicon:
    meanings: dict[int, dict[int, float]]  # foreign piece -> English piece -> weight (confidence x expected count)
    seen: Counter[int]  # how often a foreign piece stands in the text

    def best(self, piece: int, most: int) -> list[tuple[int, float]]:
        return sorted(self.meanings.get(piece, {}).items(), key=lambda item: -item[1])[:most]


def build_lexicon(
    pairs: dict[str, list[tuple[str, str]]],
    tokenizer: Tokenizer,
    english: set[int],
    most_pairs: int,
    iterations: int,
    max_tokens: int = 40,
    least: float = 0.005,
    meanings: int = 6,
) -> Lexicon:
    """The lexicon of (text, English text) per language.

    Args:
        english: the ids that may stand as a meaning.
        most_pairs: drawn per language; `max_tokens` is how many pieces of a text are read.
        least: of a couple's confidence, t(english | foreign) * sqrt(share of the English piece that it explains). The
            root of the other direction keeps out words like "the", which everything seems to mean.
        meanings: kept of a foreign piece in a language.
    """
    lexicon = Lexicon({}, Counter())
    for rows in pairs.values():
        chosen = list(rows)
        random.Random(0).shuffle(chosen)
        sides = [
            [encoding.ids[:max_tokens] for encoding in tokenizer.encode_batch(list(side), add_special_tokens=False)]
            for side in zip(*chosen[:most_pairs], strict=True)
        ]
        if not sides:
            continue
        aligned = ibm_model_1(list(zip(*sides, strict=True)), iterations)
        lexicon.seen.update(piece for sentence in sides[0] for piece in sentence)
        explained = aligned.count / np.bincount(aligned.english, aligned.count)[aligned.english]
        confidence = aligned.probability * np.sqrt(explained)
        kept: Counter[int] = Counter()
        for row in np.argsort(-confidence, kind="stable"):
            if confidence[row] <= least:
                break
            piece, meaning = int(aligned.foreign[row]), int(aligned.english[row])
            if meaning in english and kept[piece] < meanings:
                kept[piece] += 1
                found = lexicon.meanings.setdefault(piece, {})
                found[meaning] = found.get(meaning, 0.0) + float(confidence[row] * aligned.count[row])
    return lexicon


def neighbours(
    words: torch.Tensor, anchors: torch.Tensor, most: int, hub_size: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `most` nearest anchors of each word -> (values, rows), each `(words, most)`, best first.

    By 2 cos(word, anchor) - mean cosine of the anchor to its `hub_size` nearest words (CSLS of Conneau et al. 2018,
    "Word translation without parallel data", without the word's own term, which changes no order): an anchor that is
    near to everything is near to nothing. Both, `(words, hidden)` and `(anchors, hidden)`, are centred on their common
    mean first: an encoder's own cone would make all words alike.
    """
    middle = torch.cat([words, anchors]).mean(0)
    words, anchors = normalize(words - middle, dim=1), normalize(anchors - middle, dim=1)
    hub_size = min(hub_size, len(words))
    hubs = torch.cat([(part @ words.T).topk(hub_size, dim=1).values.mean(1) for part in anchors.split(1024)])
    found = [(2 * part @ anchors.T - hubs).topk(min(most, len(anchors)), dim=1) for part in words.split(1024)]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])
