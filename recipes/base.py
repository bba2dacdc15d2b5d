"""Put an English cross-encoder under a vocabulary of eight languages: Nano's starting point.

    python -m recipes.base --config recipes/querit-nano/0_base.yaml

Body and head are the English model's. A piece that both vocabularies know keeps its embedding. Any other gets the
weighted mean of its translations' embeddings, from parallel text (recipes.lib.dictionary) as far as it stands there,
and from a multilingual encoder's nearest English words for the rest. Its length is the mean of theirs: the mean of
vectors that differ is shorter than each, and a short embedding is a faint word.

`dictionary.json`, beside the weights, has for each language and English word its likeliest pieces.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertForSequenceClassification
from trl import TrlParser

from querit.files import appears_whole, write_json
from recipes.lib.dictionary import Lexicon, build_lexicon, neighbours
from recipes.lib.parallel import pairs_with_english, read_translations
from recipes.lib.pieces import START, to_wordpiece
from recipes.lib.records import already_made
from recipes.vocabulary import REPORT as VOCABULARY

REPORT, DICTIONARY = "base.json", "dictionary.json"
BLANK_ROW = "[unused1]"  # the teacher has no `▁` alone
WITHOUT_STARTS = ("ja", "zh", "ko")  # whole words of these are words wherever they stand
LEAST = 0.001  # weight of a translation in the dictionary, which is kept to three digits
MEANINGS = 5  # translations, and neighbours, that an embedding is mixed of


@dataclass
class BaseArguments:
    vocabulary: str = field(metadata={"help": "Folder that recipes.vocabulary wrote."})
    teacher: str = field(metadata={"help": "English BertForSequenceClassification whose pieces the vocabulary has."})
    encoder: str = field(metadata={"help": "Multilingual sentence-transformers model that tells words' neighbours."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    languages: list[str] = field(metadata={"help": "Languages of the parallel text, English not among them."})
    parallel: list[str] = field(metadata={"help": "Files of parallel text; see recipes.lib.parallel."})
    aligned: dict[str, dict[str, str]] = field(
        default_factory=dict, metadata={"help": "Name -> {language: BEIR folder} with equal ids for equal documents."}
    )
    encoder_revision: str | None = field(default=None, metadata={"help": "Commit of an encoder from the Hub."})
    max_characters: int = field(default=300, metadata={"help": "Longer texts are no sentences and are left out."})
    most_pairs: int = field(default=60_000, metadata={"help": "Pairs of sentences read per language."})
    iterations: int = field(default=6, metadata={"help": "Rounds of expectation maximisation."})
    doubt_of_words: float = field(
        default=2.5, metadata={"help": "At so many occurrences translations and neighbours weigh the same; of words."}
    )
    doubt_of_parts: float = field(default=6.0, metadata={"help": "The same of parts of words."})
    temperature: float = field(default=0.06, metadata={"help": "Softmax temperature over neighbours."})
    parts_length: float = field(default=0.8, metadata={"help": "Length of a part's embedding beside a word's."})


def is_word(piece: str, kind: str) -> bool:
    return len(piece.strip(START)) > 1 and (piece.startswith(START) or kind in WITHOUT_STARTS)


def weighted_mean(rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (mean of rows `(n, hidden)`, mean of their lengths); weights `(n,)` sum to 1."""
    return weights @ rows, weights @ rows.norm(dim=1)


def transplant(
    teacher_rows: torch.Tensor, teacher_ids: dict[str, int], kinds: dict[str, str], lexicon: Lexicon,
    near: dict[int, list[tuple[str, float]]], args: BaseArguments,
) -> torch.Tensor:  # fmt: skip
    """The word embeddings of the new vocabulary, `(pieces, hidden)`.

    Args:
        teacher_rows: the teacher's word embeddings, `teacher_ids` its pieces' rows.
        kinds: piece -> what it was taken for, in the order of ids.
        near: id of a piece that the teacher lacks -> English pieces near to it with their weights, which sum to 1.
    """
    pieces = list(kinds)
    rows = torch.zeros(len(pieces), teacher_rows.shape[1])
    for index, (piece, kind) in enumerate(kinds.items()):
        if kind in ("english", "special"):
            rows[index] = teacher_rows[teacher_ids[to_wordpiece(piece)]]
        elif kind == "blank":
            rows[index] = teacher_rows[teacher_ids[BLANK_ROW]]
    for index, neighbourhood in near.items():
        word = is_word(pieces[index], kinds[pieces[index]])
        words = teacher_rows[[teacher_ids[to_wordpiece(name)] for name, _ in neighbourhood]]
        mean, length = weighted_mean(words, torch.tensor([weight for _, weight in neighbourhood]))
        if found := lexicon.best(index, MEANINGS):
            weights = torch.tensor([weight for _, weight in found])
            seen, sure = lexicon.seen[index], float(weights.sum())
            trust = seen / (seen + (args.doubt_of_words if word else args.doubt_of_parts))
            trust *= min(1.0, sure / seen / 0.15) * (1.0 if word else 0.9)
            sharp = (weights / sure) ** 1.5
            translated, its_length = weighted_mean(rows[[meaning for meaning, _ in found]], sharp / sharp.sum())
            mean, length = torch.lerp(mean, translated, trust), torch.lerp(length, its_length, trust)
        rows[index] = mean / mean.norm() * length * (1.0 if word else args.parts_length)
    return rows


def neighbours_of(kinds: dict[str, str], args: BaseArguments) -> dict[int, list[tuple[str, float]]]:
    """Id of each piece that the teacher lacks -> the English words nearest to it, with weights."""
    encoder = SentenceTransformer(args.encoder, revision=args.encoder_revision)

    def encode(texts: list[str]) -> torch.Tensor:
        return encoder.encode_query(texts, batch_size=128, convert_to_tensor=True, show_progress_bar=True).float().cpu()

    pieces = list(kinds)
    anchors = [p for p, kind in kinds.items() if kind == "english" and re.fullmatch(f"{START}(?:[a-z]+|[0-9]+)", p)]
    wanted = [index for index, piece in enumerate(pieces) if kinds[piece] not in ("english", "special", "blank")]
    words = encode([pieces[index].strip(START) for index in wanted])
    values, rows = neighbours(words, encode([anchor[1:] for anchor in anchors]), MEANINGS)
    weights = (values / args.temperature).softmax(1)
    return {
        index: [(anchors[row], weight) for row, weight in zip(near, shares, strict=True)]
        for index, near, shares in zip(wanted, rows.tolist(), weights.tolist(), strict=True)
    }


def by_english_word(kinds: dict[str, str], lexicon: Lexicon, languages: list[str], most: int = 4) -> dict:
    """Language -> English word piece -> [[piece of that language, weight], ...], the likeliest first.

    A piece of one language is that one's; Chinese characters are Chinese and Japanese.
    """
    pieces = list(kinds)
    found: dict[str, dict[str, list]] = {language: {} for language in languages}
    for index, meanings in lexicon.meanings.items():
        piece, kind = pieces[index], kinds[pieces[index]]
        own = kind.removesuffix("-part")
        spoken = [own] if own in found else []
        if kind == "character" and re.match("[\u4e00-\u9fff]", piece):
            spoken = [language for language in ("ja", "zh") if language in found]
        if not (piece.startswith(START) or own in WITHOUT_STARTS or kind == "character"):
            continue  # an ending
        for meaning, weight in meanings.items():
            english = pieces[meaning]
            if english.startswith(START) and len(english) > 2:
                for language in spoken if weight >= LEAST else ():
                    found[language].setdefault(english, []).append([piece, round(weight, 3)])
    for words in found.values():
        for english, entries in words.items():
            words[english] = sorted(entries, key=lambda entry: -entry[1])[:most]
    return found


def main(args: BaseArguments) -> None:
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    kinds = json.loads((Path(args.vocabulary) / VOCABULARY).read_text(encoding="utf-8"))["pieces"]
    tokenizer = AutoTokenizer.from_pretrained(args.vocabulary)
    model = BertForSequenceClassification.from_pretrained(args.teacher)
    teacher_ids = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json")).get_vocab()
    translations = read_translations(args.parallel, args.aligned)
    pairs = pairs_with_english(translations, args.languages, args.max_characters)
    english = {index for index, kind in enumerate(kinds.values()) if kind == "english"}
    lexicon = build_lexicon(pairs, tokenizer.backend_tokenizer, english, args.most_pairs, args.iterations)
    old = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    rows = transplant(old, teacher_ids, kinds, lexicon, neighbours_of(kinds, args), args)
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)  # type: ignore[operator]
    model.config.pad_token_id = tokenizer.pad_token_id
    if hasattr(model.config, "sentence_transformers"):  # the teacher's logits are wanted, Nano's probability is
        del model.config.sentence_transformers
    report = {"pieces": Counter(kinds.values()), "translated": len(lexicon.meanings), "settings": asdict(args)}
    report["pairs"] = {language: len(found) for language, found in pairs.items()}
    with appears_whole(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / DICTIONARY, by_english_word(kinds, lexicon, args.languages))
        write_json(folder / REPORT, report)
    print(f"{out}: {len(rows):,} pieces, {len(lexicon.meanings):,} of them translated by parallel text")


if __name__ == "__main__":
    (arguments,) = TrlParser(BaseArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
