import json
import struct
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import BertModel

from recipes.base import (
    REPORT,
    BaseArguments,
    choose_pieces,
    main,
    piece_shares,
    prune_tokenizer,
    read_e5s1,
    same_pieces,
    save_retriever,
)
from tests.models_for_tests import tokenizer_of


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_of("bert").save_pretrained(folder)
    return folder / "tokenizer.json"


def vocab_of(tokenizer_file):
    return json.loads(tokenizer_file.read_text(encoding="utf-8"))["model"]["vocab"]


def test_words_whose_pieces_are_kept_are_cut_as_before(tokenizer_file):
    vocab, old = vocab_of(tokenizer_file), tokenizer_of("bert")
    words = ["the", "tide", "batteries", "日本", "Привет", "water", "document"]
    shares = piece_shares(old.backend_tokenizer, ((word, 1.0) for word in words))
    assert sum(shares.values()) == pytest.approx(1)
    keep = choose_pieces(vocab, shares, len(vocab) - 30)
    assert len(keep) == len(vocab) - 30
    new = prune_tokenizer(tokenizer_file, keep)
    for word in words:
        assert new.tokenize(word) == old.tokenize(word), word
    # Each piece keeps its row of the embeddings.
    assert [vocab[i][0] for i in keep] == new.convert_ids_to_tokens(list(range(len(keep))))


def test_same_pieces_weighs_words_by_their_frequency(tokenizer_file):
    vocab, old = vocab_of(tokenizer_file), tokenizer_of("bert").backend_tokenizer
    whole = next(word for word in ("rain", "train", "water") if len(old.encode(word, add_special_tokens=False)) == 1)
    keep = [i for i, (piece, _) in enumerate(vocab) if piece != "▁" + whole]
    new = prune_tokenizer(tokenizer_file, keep).backend_tokenizer
    assert same_pieces(old, new, [(whole, 0.3), ("the", 0.9)]) == pytest.approx(0.75)


def test_pieces_are_chosen_specials_then_characters_then_by_share():
    names = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "▁ж", "rare", "common", "first", "ߊ", "<mask>"]
    vocab = [[name, -1.0] for name in names]
    keep = choose_pieces(vocab, Counter({7: 0.1, 8: 0.9}), 9)
    assert [names[i] for i in keep] == ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "▁ж", "common", "<mask>"]


def test_spelt_out_special_tokens_are_text_for_the_pruned_tokenizer(tokenizer_file, tmp_path):
    spec = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    vocab += [[character, -9.0] for character in "</>" if character not in {piece for piece, _ in vocab}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    new = prune_tokenizer(tmp_path / "tokenizer.json", list(range(len(vocab))))
    ids = new("a </s> b <s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {new.eos_token_id, new.bos_token_id} & set(ids)
    assert new("a", "b")["input_ids"][0] == new.bos_token_id


def test_an_e5s1_file_is_read_to_the_values_that_were_written(tmp_path):
    """A file written here by the format's description: Q4_0 blocks, little endian."""
    generator = np.random.default_rng(0)
    hidden, layers, heads, intermediate, vocab, positions, types = 32, 1, 4, 64, 6, 8, 2
    expected, body, directory = {}, b"", []

    def add(name, values, quantised):
        nonlocal body
        if quantised:
            blocks = values.reshape(-1, 32)
            scale = (np.abs(blocks).max(1) / 7).astype("<f2")
            q = np.clip(np.round(blocks / scale[:, None].astype("f4")), -8, 7).astype(int) + 8
            expected[name] = ((q - 8) * scale[:, None].astype("f4")).reshape(values.shape)
            data = b"".join(
                s.tobytes() + (row[:16] | row[16:] << 4).astype("u1").tobytes() for s, row in zip(scale, q, strict=True)
            )
        else:
            expected[name], data = values, values.astype("<f4").tobytes()
        directory.append((name, values.size, len(body), len(data)))
        body += data

    def random(*shape):
        return generator.normal(size=shape).astype("f4")

    add("emb.word", random(vocab, hidden), True)
    for name, shape in (
        ("emb.pos", (positions, hidden)),
        ("emb.type", (types, hidden)),
        ("emb.ln.w", (hidden,)),
        ("emb.ln.b", (hidden,)),
    ):
        add(name, random(*shape), False)
    for name in ("q", "k", "v", "ao"):
        add(f"l0.{name}.w", random(hidden, hidden), True)
        add(f"l0.{name}.b", random(hidden), False)
    add("l0.fi.w", random(intermediate, hidden), True)
    add("l0.fi.b", random(intermediate), False)
    add("l0.fo.w", random(hidden, intermediate), True)
    add("l0.fo.b", random(hidden), False)
    for name in ("aln", "oln"):
        add(f"l0.{name}.w", random(hidden), False)
        add(f"l0.{name}.b", random(hidden), False)

    header = b"E5S1" + struct.pack(
        "<Iiiiiiiifi", 1, hidden, layers, heads, intermediate, vocab, positions, types, 1e-12, 32
    )
    text = b"abcdef"
    tables = (
        struct.pack("<iiiiiQ", 2, 0, 2, 1, 3, len(text))
        + b"\0" * (3 * 4 + 2 * 4)
        + text
        + struct.pack("<iI", 0, 3)
        + b"xyz"
    )
    size = 4 + sum(2 + len(n) + struct.calcsize("<BIQQ") for n, *_ in directory)
    start = len(header) + len(tables) + size
    entries = struct.pack("<i", len(directory))
    for name, count, offset, length in directory:
        entries += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", 0, count, start + offset, length)
    path = tmp_path / "weights.bin"
    path.write_bytes(header + tables + entries + body)

    state, config = read_e5s1(path)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.pad_token_id) == (32, 1, 6, 1)
    layer = "encoder.layer.0."
    for ours, theirs in {
        "embeddings.word_embeddings.weight": "emb.word", "embeddings.position_embeddings.weight": "emb.pos",
        layer + "attention.self.key.weight": "l0.k.w", layer + "attention.output.dense.weight": "l0.ao.w",
        layer + "intermediate.dense.weight": "l0.fi.w", layer + "output.dense.weight": "l0.fo.w",
        layer + "output.LayerNorm.bias": "l0.oln.b", layer + "attention.output.LayerNorm.weight": "l0.aln.w",
    }.items():  # fmt: skip
        assert np.allclose(state[ours].numpy(), expected[theirs], atol=1e-6), ours
    BertModel(config, add_pooling_layer=False).load_state_dict(state, strict=True)
    (tmp_path / "weights.bin").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ValueError, match="is not an E5S1 file"):
        read_e5s1(path)


def test_a_folder_of_other_settings_or_of_none_that_are_told_is_left_alone(tmp_path, capsys):
    args = BaseArguments(output_dir=str(tmp_path / "base"), vocab_size=60)
    (tmp_path / "base").mkdir()
    with pytest.raises(FileExistsError, match="nothing tells how it was made"):
        main(args)
    (tmp_path / "base" / REPORT).write_text(json.dumps({"pieces": 60, "settings": asdict(args)}))
    main(args)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"other settings \(vocab_size, languages\)"):
        main(BaseArguments(output_dir=str(tmp_path / "base"), vocab_size=61, languages=["de"]))


def test_the_retriever_folder_embeds_with_mean_pooling_and_the_prompts(tmp_path, tokenizer_file):
    from sentence_transformers import SentenceTransformer

    from tests.models_for_tests import tiny_config

    torch.manual_seed(0)
    model = BertModel(tiny_config("bert"), add_pooling_layer=False).eval()
    tokenizer = prune_tokenizer(tokenizer_file, list(range(len(vocab_of(tokenizer_file)))))
    save_retriever(model.state_dict(), model.config, tokenizer, tmp_path / "base")
    found = SentenceTransformer(str(tmp_path / "base")).encode_query("the tide", convert_to_tensor=True)
    inputs = tokenizer("query: the tide", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    assert torch.allclose(found, expected, atol=1e-5)
