"""A small world for Nano's first stages: an English cross-encoder, and German and Japanese text that says the same."""

import json
import random
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification

from recipes.lib.pieces import SPECIAL, as_transformers, from_wordpiece, unigram
from recipes.vocabulary import REPORT

ENGLISH = ["the", "dog", "cat", "water", "house", "bread", "ship", "sees", "finds", "likes", "old", "small"]
GERMAN = ["das", "hund", "katze", "wasser", "haus", "brot", "schiff", "sieht", "findet", "mag", "altes", "kleines"]
JAPANESE = ["その", "犬", "猫", "水", "家", "パン", "船", "見る", "見つける", "好む", "古い", "小さい"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HIDDEN = 32


@cache
def wordpiece() -> Tokenizer:
    """The teacher's: whole English words, letters for all others, punctuation."""
    tokens = [*SPECIAL.values(), "[unused1]", *ENGLISH, *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", ",", "?"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def save_teacher(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=wordpiece().get_vocab_size(), hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=512, num_labels=1, initializer_range=0.3,
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    as_transformers(wordpiece()).save_pretrained(folder)
    return folder


def kinds() -> dict[str, str]:
    """A vocabulary as recipes.vocabulary has it: piece -> what it was taken for."""
    ids = wordpiece().get_vocab()
    english = filter(None, map(from_wordpiece, sorted(ids, key=ids.__getitem__)))
    found = dict.fromkeys(SPECIAL.values(), "special") | dict.fromkeys(english, "english") | {"▁": "blank"}
    found |= {character: "character" for word in JAPANESE for character in word} | {f"▁{x}": "character" for x in "äö"}
    return found | {f"▁{word}": "de" for word in GERMAN} | {word: "ja" for word in JAPANESE if len(word) > 1}


def save_vocabulary(folder: Path) -> Path:
    pieces = kinds()
    scores = {piece: -100.0 if kind == "special" else -6.0 for piece, kind in pieces.items()}
    as_transformers(unigram(scores)).save_pretrained(folder)
    (folder / REPORT).write_text(json.dumps({"pieces": pieces}, ensure_ascii=False), encoding="utf-8")
    return folder


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences that differ by chance, in three languages; a Japanese verb comes last."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [0, rng.randint(10, 11), rng.randint(1, 6), rng.randint(7, 9), 0, rng.randint(1, 6)]
        turned = [*words[:3], *words[4:], words[3]]
        rows.append(
            {
                "en": " ".join(ENGLISH[word] for word in words) + ".",
                "de": " ".join(GERMAN[word] for word in words) + ".",
                "ja": "".join(JAPANESE[word] for word in turned) + ".",
            }
        )
    return rows


def save_parallel(path: Path, rows: list[dict[str, str]]) -> Path:
    """In the form of pairs, one row for each language with English."""
    pairs = [{"sl": x, "s": row[x], "tl": "en", "t": row["en"]} for row in rows for x in ("de", "ja")]
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return path
