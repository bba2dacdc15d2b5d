"""Nano's tokenizer: words in lower case, cut into the pieces of a Unigram model, `▁` at the start of a word.

English pieces are the teacher's WordPiece pieces in Unigram's spelling: `tide` is `▁tide` and `##s` is `s`. Chinese and
Japanese characters carry no `▁`: a text's words are not told apart there, so a piece must not depend on what precedes.
"""

import json
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}  # ids 0 to 4
START = "▁"
CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f"
HANGUL = "\uac00-\ud7a3"
INVISIBLE = "[\u0000-\u0008\u000e-\u001f\u007f\u200b-\u200f\u202a-\u202e\ufeff\ufffd]"
# Of the teacher's pieces those of Latin, Greek and symbols; the other scripts' stand for letters at best.
LATIN_OR_SYMBOLS = re.compile("^[\u0000-\u024f\u0370-\u03ff\u2000-\u2bff\u1e00-\u1eff\\W\\d_]+$")
INSIDE_WORDS = re.compile("[a-z0-9\u00df\u03b1-\u03c9²³]")  # punctuation is cut off words before pieces are looked up
RARE = -100.0  # score of a special token, far under every spelling of it: "[SEP]" in a text is text


def normalizer() -> normalizers.Normalizer:
    """NFKC, lower case, no marks on Latin letters (as the teacher reads them); й, が and 가 keep theirs.

    ß is ss and ё is е, for many writers spell them so, and wordfreq's lists know no other spelling of ß.
    """
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(INVISIBLE), ""),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("ß", "ss"),
            normalizers.Replace("ё", "е"),
            normalizers.NFD(),
            normalizers.Replace(Regex("(?<=[a-z])\\p{Mn}+"), ""),
            normalizers.NFC(),
        ]
    )


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),  # at spaces and punctuation
            pre_tokenizers.Metaspace(replacement=START, prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(f"{START}(?=[{CJK}])"), "removed"),
        ]
    )


def from_wordpiece(token: str) -> str | None:
    """A WordPiece token in Unigram's spelling, or None for one that no text is cut into, or of another script."""
    body = token.removeprefix("##")
    inside = body != token
    if re.fullmatch(r"\[.*\]", token) or re.search(f"[{CJK}]", body) or not LATIN_OR_SYMBOLS.match(body):
        return None
    if inside and len(body) == 1 and not INSIDE_WORDS.match(body):
        return None
    return body if inside else START + body


def to_wordpiece(piece: str) -> str:
    """What `from_wordpiece` made a piece from; a special token is the same in both."""
    if piece in SPECIAL.values():
        return piece
    return piece.removeprefix(START) if piece.startswith(START) else f"##{piece}"


def unigram(scores: dict[str, float]) -> Tokenizer:
    """The tokenizer of pieces and their scores (log probabilities), the special tokens first.

    A pair is `[CLS] query [SEP] document [SEP]` with segment ids 0 and 1.
    """
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=1, byte_fallback=False))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer(), pre_tokenizer()
    tokenizer.decoder = decoders.Metaspace(replacement=START, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    return tokenizer


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With segment ids, which transformers 5 leaves out unless they are named, and of whatever version reads it."""
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


def hold_english(embeddings: torch.nn.Parameter, vocabulary: str) -> None:
    """Let no gradient through to the rows of English and special pieces, told by a folder of recipes.vocabulary.

    They stay as they are under an optimiser without weight decay.
    """
    kinds = json.loads((Path(vocabulary) / "vocabulary.json").read_text(encoding="utf-8"))["pieces"].values()
    if len(kinds) != len(embeddings):
        raise ValueError(f"{vocabulary} has {len(kinds)} pieces, the model {len(embeddings)}: they do not go together.")
    free = torch.tensor([kind not in ("english", "special") for kind in kinds], device=embeddings.device)
    embeddings.register_hook(lambda gradient: gradient * free[:, None])
