"""Put English queries partly into other languages, so that a reranker learns to read across languages.

    python -m recipes.codeswitch --config recipes/querit-nano/1_general_codeswitch.yaml

Questions with judged passages are scarce in most languages. Replacing words of an English query by words of another
language, and leaving passages and labels as they are, trains the match between languages (Litschko et al., "Boosting
Zero-shot Cross-lingual Retrieval by Training on Artificially Code-Switched Data", Findings of ACL 2023). The word pairs
are induced from the multilingual encoder itself: nearest neighbours by CSLS (Conneau et al. 2018) among the most
frequent words of both languages. Mutual ones alone would leave out all but one form of an inflected word.
"""

import random
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import wordfreq
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from trl import TrlParser

from recipes.records import already_made, write_parquet

WRITTEN_WITHOUT_SPACES = ("zh", "ja")


@dataclass
class CodeswitchArguments:
    data: list[str] = field(metadata={"help": "Parquet files of recipes.score; their queries are put together."})
    output: str = field(metadata={"help": "Parquet file to write; it appears only when complete."})
    encoder: str = field(metadata={"help": "sentence-transformers model that the word pairs come from."})
    targets: list[str] = field(metadata={"help": "Targets of the data whose queries are English."})
    encoder_revision: str | None = field(default=None, metadata={"help": "Commit of an encoder from the Hub."})
    languages: list[str] = field(
        default_factory=lambda: ["zh", "es", "fr", "de", "ru", "ko", "ja"], metadata={"help": "Languages to switch to."}
    )
    copies: int = field(default=1, metadata={"help": "Times each of those queries is put out."})
    share: float = field(default=0.7, metadata={"help": "Share of the copies that are switched."})
    word_share: float = field(default=0.85, metadata={"help": "Share of a query's known words that are replaced."})
    words: int = field(default=15_000, metadata={"help": "Most frequent words of each language to pair."})
    similarity: float = field(default=0.5, metadata={"help": "Least cosine of a word pair (means removed)."})
    seed: int = field(default=0, metadata={"help": "Seed of every choice made here."})


def translations(a: torch.Tensor, b: torch.Tensor, similarity: float, k: int = 10) -> list[tuple[int, int]]:
    """Pairs (row of a, its nearest row of b by CSLS) of at least this cosine.

    csls(x, y) = 2 cos(x, y) - mean cos of x to its k nearest - mean cos of y to its k nearest (Conneau et al. 2018,
    "Word translation without parallel data"). `a` and `b`, `(words, hidden)`, are centred here: an encoder's own cone
    would make all words alike.
    """
    a, b = (torch.nn.functional.normalize(x - x.mean(0), dim=1) for x in (a, b))
    cosine = a @ b.T
    near_a = cosine.topk(min(k, cosine.shape[1]), dim=1).values.mean(1)
    near_b = cosine.topk(min(k, cosine.shape[0]), dim=0).values.mean(0)
    csls = 2 * cosine - near_a[:, None] - near_b[None, :]
    there = csls.argmax(1)
    rows = torch.arange(len(a))
    kept = cosine[rows, there] >= similarity
    return [(int(i), int(there[i])) for i in rows[kept]]


def frequent_words(language: str, count: int) -> list[str]:
    """The most frequent words of a language (wordfreq) without those that English uses more: loans, names."""
    words = [word for word in wordfreq.top_n_list(language, count) if word.isalpha()]
    if language == "en":
        return words
    foreign = wordfreq.get_frequency_dict("en", wordlist="best")
    own = wordfreq.get_frequency_dict(language, wordlist="best")
    return [word for word in words if own.get(word, 0) > foreign.get(word, 0)]


def switch(query: str, pairs: dict[str, str], word_share: float, joined: bool, rng: random.Random) -> str:
    """The query with a share of its known words replaced; `joined` drops the space between two replaced words."""
    parts: list[tuple[str, bool]] = []
    for part in re.findall(r"\w+|\W+", query):
        other = pairs.get(part.lower())
        if other is None or rng.random() >= word_share:
            parts.append((part, False))
        else:
            parts.append((other.capitalize() if part[0].isupper() and not joined else other, True))
    if joined:
        inner = range(1, len(parts) - 1)
        drop = {i for i in inner if parts[i][0].isspace() and parts[i - 1][1] and parts[i + 1][1]}
        parts = [part for i, part in enumerate(parts) if i not in drop]
    return "".join(text for text, _ in parts)


def word_pairs(args: CodeswitchArguments) -> dict[str, dict[str, str]]:
    """Language -> English word -> its word in that language."""
    model = SentenceTransformer(args.encoder, revision=args.encoder_revision)

    def encode(words: list[str]) -> torch.Tensor:
        return model.encode_query(words, batch_size=128, convert_to_tensor=True, show_progress_bar=False).float().cpu()

    english = frequent_words("en", args.words)
    source = encode(english)
    pairs = {}
    for language in tqdm(args.languages, desc="word pairs"):
        words = frequent_words(language, args.words)
        found = translations(source, encode(words), args.similarity)
        pairs[language] = {english[i]: words[j] for i, j in found if english[i] != words[j]}
    return pairs


def main(args: CodeswitchArguments) -> None:
    out = Path(args.output)
    if already_made(out, asdict(args)):
        return
    data = load_dataset("parquet", data_files=args.data, split="train")
    if missing := set(args.targets) - set(data.unique("target")):
        raise ValueError(f"No target {sorted(missing)} in the data; there are {sorted(data.unique('target'))}.")
    pairs = word_pairs(args)
    rng = random.Random(args.seed)
    rows, switched = [], 0
    for row in data:
        if row["target"] not in args.targets:
            rows.append(row)
            continue
        for language in rng.sample(args.languages, args.copies):
            text = row["query"]
            if rng.random() < args.share:
                joined = language in WRITTEN_WITHOUT_SPACES
                text = switch(text, pairs[language], args.word_share, joined, rng)
            switched += text != row["query"]
            rows.append({**row, "query": text})
    rng.shuffle(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(Dataset.from_list(rows, features=data.features), out, asdict(args))
    sizes = ", ".join(f"{language} {len(words):,}" for language, words in pairs.items())
    print(f"{out}: {switched:,} of {len(rows):,} queries switched; word pairs: {sizes}")


if __name__ == "__main__":
    (arguments,) = TrlParser(CodeswitchArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
