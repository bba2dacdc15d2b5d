"""Choose the pieces of Nano's vocabulary, and write its tokenizer.

    python -m recipes.vocabulary --config recipes/querit-nano/0_vocabulary.yaml

The body of Nano is an English cross-encoder's, so its English pieces are that model's own. To them come the characters
of the other languages, their most frequent whole words (a body that knows words is taught a word more easily than its
fragments), and frequent parts of the words that have no piece. Frequencies are those of wordfreq's lists and of text.
Scores favour few, long pieces: they grow with the logarithm of a piece's frequency, but little beside what a further
piece costs. `vocabulary.json` says for each piece what it was taken for.
"""

import difflib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from tqdm import tqdm
from trl import TrlParser
from wordfreq import top_n_list, word_frequency

from querit.files import appears_whole, write_json
from recipes.lib.data import read_corpus, read_queries
from recipes.lib.parallel import read_parallel
from recipes.lib.pieces import (
    CJK,
    HANGUL,
    RARE,
    SPECIAL,
    START,
    as_transformers,
    from_wordpiece,
    normalizer,
    pre_tokenizer,
    unigram,
)
from recipes.lib.records import already_made

REPORT = "vocabulary.json"
RANKED_ONLY = ("ko", "ja", "zh")  # wordfreq's words of these are cut by rules of its own: their order counts alone
# What a piece of a language looks like; all others are taken to be written in Latin letters.
SCRIPTS = {"ru": "[а-яё]", "ja": f"[{CJK}]", "zh": f"[{CJK}]", "ko": f"[{HANGUL}]"}
LETTER = r"\w"
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяё"


@dataclass
class VocabularyArguments:
    teacher: str = field(metadata={"help": "Folder of a model with a WordPiece tokenizer, whose pieces are taken."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    texts: dict[str, list[str]] = field(metadata={"help": "Language -> BEIR folders (no judged sets); English first."})
    words: dict[str, int] = field(metadata={"help": "Language -> whole words to take."})
    parts: dict[str, int] = field(metadata={"help": "Language -> parts of words to take."})
    english: int | None = field(
        default=None, metadata={"help": "The teacher's pieces to take, those used most; all of them if left out."}
    )
    syllables: int = field(default=350, metadata={"help": "Couples of letters among the parts, for names."})
    parallel: list[str] = field(default_factory=list, metadata={"help": "Files of recipes.lib.parallel, read as text."})
    max_characters: int = field(default=4_000_000, metadata={"help": "Characters of text read per language."})
    cjk_characters: int = field(default=4700, metadata={"help": "Chinese and Japanese characters to take."})
    hangul_characters: int = field(default=1800, metadata={"help": "Korean syllables to take."})
    hangul_starts: int = field(default=500, metadata={"help": "Korean syllables to take as starts of words, too."})
    other_characters: int = field(default=9000, metadata={"help": "Most frequent characters to look for others in."})
    text_weight: float = field(default=0.35, metadata={"help": "Weight of texts beside wordfreq in a word's share."})
    piece_cost: float = field(default=6.0, metadata={"help": "What each further piece costs a way to cut a word."})
    frequency_weight: float = field(default=0.35, metadata={"help": "Weight of log frequency in a piece's score."})
    sample: int = field(default=3000, metadata={"help": "Texts per language that the pieces' frequency is counted in."})
    seed: int = field(default=0, metadata={"help": "Seed of the texts' sample."})


def read_language(language: str, args: VocabularyArguments) -> Iterator[list[str]]:
    """The texts of each source."""
    for folder in args.texts[language]:
        yield [*read_corpus(folder).values(), *read_queries(folder).values()]
    for path in args.parallel:
        yield [translation[language] for translation in read_parallel(path) if translation.get(language)]


def drawn_texts(sources: Iterable[list[str]], max_characters: int, rng: random.Random) -> list[str]:
    """Texts drawn from every source alike: equally many characters of each, as far as it has them."""
    sources = [rng.sample(source, len(source)) for source in sources if source]
    sizes = sorted(sum(map(len, source)) for source in sources)
    left = share = max_characters
    for place, size in enumerate(sizes):  # what a small source leaves is the others'
        share = left // (len(sizes) - place)
        left -= min(size, share)
    kept = []
    for source in sources:
        read = 0
        for text in source:
            if read >= share:
                break
            read += len(text)
            kept.append(text)
    return kept


def character_shares(counts: dict[str, Counter[str]], clean: Callable[[str], str]) -> Counter[str]:
    """Character -> sum over languages of its share in texts and wordfreq's words."""
    shares: Counter[str] = Counter()
    for language, words in counts.items():
        total = sum(words.values())
        for word, count in words.items():
            for character in word:
                shares[character] += count / total  # type: ignore[assignment]  # a Counter of floats
        for rank, word in enumerate(top_n_list(language, 40_000)):
            ranked = language in RANKED_ONLY
            frequency = 1 / (rank + 10) if ranked else word_frequency(word, language, minimum=1e-8)
            for character in clean(word):
                shares[character] += 0.3 * frequency  # type: ignore[assignment]
    return shares


def character_pieces(shares: Counter[str], args: VocabularyArguments) -> Iterator[str]:
    ordered = [character for character, _ in shares.most_common()]
    cjk = [character for character in ordered if re.match(f"[{CJK}]", character)]
    hangul = [character for character in ordered if re.match(f"[{HANGUL}]", character)]
    yield from cjk[: args.cjk_characters]
    yield from hangul[: args.hangul_characters]
    yield from (START + character for character in hangul[: args.hangul_starts])
    for character in CYRILLIC:
        yield from (character, START + character)
    for character in ordered[: args.other_characters]:
        if not re.match(f"[{CJK}{HANGUL}{START}]", character):
            if character.strip():
                yield START + character
            if character.isalpha():
                yield character


def word_shares(
    language: str, counts: Counter[str], cut: Callable[[str], list[str]], text_weight: float
) -> Counter[str]:
    """Whole words of a language as pieces -> what they are worth. `cut` is the way from a text to its words."""
    shares: Counter[str] = Counter()
    if language in RANKED_ONLY:
        for rank, word in enumerate(top_n_list(language, 30_000)):
            (piece, *more) = cut(word) or [""]
            if not more and re.fullmatch(f"{START}?[{CJK}{HANGUL}]{{2,}}", piece):
                shares.setdefault(piece, 1 / (rank + 10))  # type: ignore[arg-type]
        return shares
    total = sum(counts.values())
    for word, count in counts.items():
        shares[word] += text_weight * count / total  # type: ignore[assignment]
    for word in top_n_list(language, 200_000):
        for piece in cut(word):
            shares[piece] += (1 - text_weight) * word_frequency(word, language)  # type: ignore[assignment]
    shape = re.compile(f"{START}{SCRIPTS.get(language, LETTER)}{{2,}}")
    return Counter({word: share for word, share in shares.items() if shape.fullmatch(word) and word[1:].isalpha()})


def by_share(shares: Counter[str]) -> list[str]:
    return sorted(shares, key=lambda piece: (-shares[piece], piece))


def part_pieces(
    language: str, words: Counter[str], most: int, syllables: int = 0, known: Collection[str] = ()
) -> list[str]:
    """Parts of words that have no piece of their own, best first. `words` says how often each is used, or its share.

    Where words are spelt in an alphabet: stems and endings, as a Unigram model learns them (Kudo 2018, "Subword
    Regularization"), after the commonest couples of letters, for names. Where they are not: starts and ends (Korean)
    or any run of two or three characters, by how many characters they save.
    """
    saved: Counter[str] = Counter()
    if language not in RANKED_ONLY:
        rows = words.most_common(90_000)
        # The root of a share: an ending is worth what many words have, not what the commonest one has.
        counts = {word: max(1, round(60 * math.sqrt(share / rows[0][1]))) for word, share in rows}
        for word, count in counts.items():
            for start in range(1, len(word) - 1):
                saved[word[start : start + 2]] += count
        couples = [piece for piece, _ in saved.most_common(syllables)]
        size = most * 5 // 4 + 100
        while True:
            pieces = list(dict.fromkeys([*couples, *unigram_parts(counts, size)]))
            # Some of a model's pieces are known from another language: then a larger one is asked.
            if sum(piece not in known for piece in pieces) >= most or size >= 10 * most:
                return pieces
            size = size * 7 // 4
    letters = SCRIPTS[language]
    for word, count in Counter({w: c for w, c in words.items() if re.search(letters, w)}).most_common(60_000):
        body = word.strip(START)
        if word.startswith(START):
            for size in range(2, 5):
                if len(body) > size:
                    saved[body[-size:]] += count * (size - 1)
                    saved[START + body[:size]] += count * (size - 1)
        else:
            for size in (2, 3):
                for start in range(len(body) - size + 1):
                    saved[body[start : start + size]] += count * (size - 1)
    return [piece for piece, _ in saved.most_common() if len(piece.strip(START)) > 1]


def unigram_parts(counts: dict[str, int], size: int) -> list[str]:
    """The pieces of two letters and more of a Unigram model of so many pieces, best first."""
    tokenizer = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=size, max_piece_length=14, shrinking_factor=0.75, unk_token=SPECIAL["unk"], show_progress=False
    )
    tokenizer.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [piece for piece, _ in pieces if len(piece.strip(START)) > 1 and piece != SPECIAL["unk"]]


def used_most(pieces: Iterable[str], counts: Counter[str], most: int | None) -> set[str]:
    """The English pieces that texts and wordfreq's words are cut into most often, and all of a single character."""
    pieces = list(pieces)
    if most is None or len(pieces) <= most:
        return set(pieces)
    used: Counter[str] = Counter({piece: 10**9 for piece in pieces if len(piece.strip(START)) < 2})
    total = sum(counts.values())
    shares = Counter({word: count / total for word, count in counts.items()})
    cut = word_cutter()
    for word in top_n_list("en", 100_000):
        for piece in cut(word):
            shares[piece] += word_frequency(word, "en")  # type: ignore[assignment]
    words = list(shares)
    flat = unigram(dict.fromkeys([*SPECIAL.values(), *pieces], -10.0))  # as few pieces as there can be
    for word, encoding in zip(words, flat.encode_batch(words, add_special_tokens=False), strict=True):
        for piece in encoding.tokens:
            used[piece] += shares[word]  # type: ignore[assignment]
    return set(sorted(pieces, key=lambda piece: -used[piece])[:most])


def choose_pieces(teacher: Tokenizer, counts: dict[str, Counter[str]], args: VocabularyArguments) -> dict[str, str]:
    """Piece -> what it was taken for, in the order of ids: special, english, blank, character, a language, its parts.

    `counts` are the words of each language's texts.
    """
    kinds = dict.fromkeys(SPECIAL.values(), "special")
    clean, words = normalizer().normalize_str, word_cutter()

    def add(pieces: Iterable[str], kind: str, most: int | None = None) -> None:
        added = 0
        for piece in pieces:
            if added == most:
                return
            if piece and piece not in kinds:
                kinds[piece] = kind
                added += 1

    ids = teacher.get_vocab()
    english = list(filter(None, map(from_wordpiece, sorted(ids, key=ids.__getitem__))))
    kept = used_most(english, counts["en"], args.english)
    add((piece for piece in english if piece in kept), "english")
    add([START], "blank")
    foreign = {language: found for language, found in counts.items() if language != "en"}
    add(character_pieces(character_shares(foreign, clean), args), "character")
    for language, most in args.words.items():
        shares = word_shares(language, counts[language], words, args.text_weight)
        add(by_share(shares), language, most)
        rest = counts[language] if language in RANKED_ONLY else shares
        rest = Counter({word: value for word, value in rest.items() if word not in kinds})
        most = args.parts[language]
        add(part_pieces(language, rest, most, args.syllables, kinds), f"{language}-part", most)
    return kinds


def word_cutter() -> Callable[[str], list[str]]:
    normalize, split = normalizer(), pre_tokenizer()
    return lambda text: [word for word, _ in split.pre_tokenize_str(normalize.normalize_str(text))]


def score_pieces(pieces: Iterable[str], texts: list[str], args: VocabularyArguments) -> Tokenizer:
    """The tokenizer, its scores from the pieces' counts in texts that are cut, twice, with the scores so far."""
    scores = dict.fromkeys(pieces, -10.0)
    for _ in range(2):
        found: Counter[str] = Counter()
        for encoding in unigram(scores).encode_batch(texts, add_special_tokens=False):
            found.update(encoding.tokens)
        total = sum(found.values())
        for piece in scores:
            log_share = math.log((found[piece] + 0.3) / total)
            scores[piece] = -args.piece_cost + args.frequency_weight * log_share
        scores |= dict.fromkeys(SPECIAL.values(), RARE) | {START: -2 * args.piece_cost}
    return unigram(scores)


def report(tokenizer: Tokenizer, teacher: Tokenizer, texts: dict[str, list[str]]) -> dict:
    """Per language characters per token and the share of unknown ones; in English the share cut as the teacher does."""
    lines = {}
    for language, rows in texts.items():
        cut = tokenizer.encode_batch(rows, add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in cut)
        unknown = sum(encoding.ids.count(1) for encoding in cut)
        lines[language] = {"characters_per_token": sum(map(len, rows)) / tokens, "unknown": unknown / tokens}
    same = total = 0
    for text in texts.get("en", []):
        ours = [token.removeprefix(START) for token in tokenizer.encode(text, add_special_tokens=False).tokens][:400]
        theirs = [token.removeprefix("##") for token in teacher.encode(text, add_special_tokens=False).tokens][:400]
        blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
        same, total = same + sum(block.size for block in blocks), total + len(theirs)
    return {"languages": lines, "english_as_the_teacher": same / max(total, 1)}


def main(args: VocabularyArguments) -> None:
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    if missing := args.words.keys() - args.texts.keys() | args.words.keys() ^ args.parts.keys():
        raise ValueError(f"words, parts and texts must name the same languages; {', '.join(sorted(missing))} are not.")
    teacher = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json"))
    words, rng = word_cutter(), random.Random(args.seed)
    counts, sample = {}, {}
    for language in args.texts:
        texts = drawn_texts(read_language(language, args), args.max_characters, rng)
        counts[language] = Counter(word for text in tqdm(texts, desc=language) for word in words(text))
        sample[language] = rng.sample(texts, min(args.sample, len(texts)))
    kinds = choose_pieces(teacher, counts, args)
    tokenizer = score_pieces(kinds, [text for rows in sample.values() for text in rows], args)
    found = report(tokenizer, teacher, {language: rows[:300] for language, rows in sample.items()})
    with appears_whole(out) as folder:
        as_transformers(tokenizer).save_pretrained(folder)
        write_json(folder / REPORT, {"pieces": kinds, "report": found, "settings": asdict(args)})
    print(f"{out}: {len(kinds):,} pieces {dict(Counter(kinds.values()))}\n{json.dumps(found, indent=1)}")


if __name__ == "__main__":
    (arguments,) = TrlParser(VocabularyArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
