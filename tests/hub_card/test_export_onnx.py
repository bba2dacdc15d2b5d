"""Exports to ONNX, run by ONNX Runtime: of a tiny model and of the released Nano."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from transformers import pipeline
from typer.testing import CliRunner

import querit
from hub_card.export import export
from hub_card.exported_onnx import OnnxReranker
from modeling_querit.modeling_querit import QueritForSequenceClassification
from querit import cli
from tests.hub_card.test_nano import ASKED, NANO
from tests.hub_card.test_nano import DOCUMENTS as ANSWERS
from tests.models_for_tests import MAX_LENGTH, SCRATCH, folder_of

FILES = ["onnx/model.onnx", "onnx/model_int8.onnx"]
QUERY = "when does the train leave"
DOCUMENTS = [
    "The train to Cologne leaves at 7:45 from platform 12.",
    "Oil.",
    "",
    "Der Zug fährt um 7:45 Uhr ab; er hält unterwegs in Düsseldorf und kommt gegen neun Uhr an.",
    "今天的天气很好，我们去公园散步吧。",
    "A control token is [SEP] plain text, [CLS] and so is [MASK] this.",
    " ".join(["It stops at every village on the way, and then it stops again."] * 60),
]


@cache
def exported(kind: str) -> Path:
    return export(NANO if kind == "nano" else folder_of(kind), SCRATCH / "exports" / f"{kind}-onnx", "onnx")


@cache
def session_of(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@cache
def tiny() -> QueritForSequenceClassification:
    return QueritForSequenceClassification.from_pretrained(folder_of("bert"), dtype=torch.float32).eval()


def run(file, input_ids, mask, segments):
    values = (np.asarray(array, np.int64) for array in (input_ids, mask, segments))
    inputs = dict(zip(("input_ids", "attention_mask", "token_type_ids"), values, strict=True))
    (logits,) = session_of(file).run(["logits"], inputs)
    return logits


def scores_of(ranker, query, documents, key="score"):
    return [row[key] for row in sorted(ranker(query, documents), key=lambda row: row["index"])]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- float32


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    extra=st.integers(0, 5),
    left=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_float32_gives_the_models_log_odds_for_any_batch_and_padding(lengths, extra, left, seed):
    width = max(lengths) + extra
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, tiny().config.vocab_size, (len(lengths), width))
    mask = np.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        mask[row, width - length if left else 0 : width if left else length] = 1
    segments = rng.integers(0, 2, input_ids.shape)
    with torch.no_grad():
        tensors = map(torch.from_numpy, (input_ids, mask, segments))
        expected = tiny()(**dict(zip(("input_ids", "attention_mask", "token_type_ids"), tensors, strict=True))).logits
    found = run(exported("bert") / FILES[0], input_ids, mask, segments)
    assert found.shape == (len(lengths), 1) and found.dtype == np.float32
    assert found == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.mark.parametrize("kind", ["bert", "nano"])
def test_float32_scores_as_the_pipeline_does(kind):
    source = NANO if kind == "nano" else folder_of(kind)
    ranker = pipeline("text-ranking", model=str(source), trust_remote_code=True, dtype=torch.float32)
    theirs = querit.load(exported(kind) / FILES[0])
    for query in (QUERY, "天気", "a " * 700):
        found, expected = theirs(query, DOCUMENTS), ranker(query, DOCUMENTS)
        assert [row["truncated"] for row in found] == [row["truncated"] for row in expected]
        for key in ("score", "probability"):
            assert scores_of(theirs, query, DOCUMENTS, key) == pytest.approx(
                scores_of(ranker, query, DOCUMENTS, key), abs=1e-4
            )


# ---------------------------------------------------------------- int8


def test_int8_quantises_layers_and_embeddings_but_not_the_head():
    folder = exported("bert")
    quantised, plain = (onnx.load(folder / name).graph for name in reversed(FILES))
    products = [node for node in quantised.node if node.op_type == "MatMulInteger"]
    assert len(products) == 2 * 5  # two layers: query, key, value, output, and the first of the feed-forward part
    kept = {tensor.name: tensor for tensor in quantised.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    pooler, classifier = [node for node in plain.node if node.op_type == "Gemm"]
    assert {(48, 48), (1, 48)} <= {tuple(sorted(tensor.dims)) for tensor in kept.values()}, (pooler, classifier)
    assert not any("word_embeddings" in name and "scale" not in name for name in kept)


def test_products_of_int8_fit_16_bits_where_there_is_no_vnni():
    """VPMADDUBSW adds two products of an activation in [0, 255] and a weight with saturation at 32,767."""
    graph = onnx.load(exported("bert") / FILES[1]).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [tensors[node.input[1]] for node in graph.node if node.op_type == "MatMulInteger"]
    rng = np.random.default_rng(0)
    for weight in weights:
        assert weight.dtype == np.int8 and weight.min() >= -64 and weight.max() >= 60  # 7 bits, and used
        activations = rng.choice(np.array([0, 255]), (4, weight.shape[0]))
        products = activations[:, :, None] * weight.astype(np.int64)
        pairs = products[:, ::2] + products[:, 1::2]
        assert np.array_equal(pairs, pairs.clip(-32768, 32767))
        assert 2 * 255 * np.abs(weight.astype(np.int64)).max() <= 32767  # whatever the two are
    # Embeddings are looked up and not multiplied: they keep all 8 bits.
    tables = [tensors[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in tensors]
    assert any(table.dtype == np.uint8 and (table.min(), table.max()) == (0, 255) for table in tables)


@pytest.mark.parametrize(("kind", "least"), [("bert", 0.97), ("nano", 0.9)])
def test_int8_ranks_nearly_as_the_model_does(kind, least):
    source = NANO if kind == "nano" else folder_of(kind)
    ranker = pipeline("text-ranking", model=str(source), trust_remote_code=True, dtype=torch.float32)
    int8 = querit.load(exported(kind) / FILES[1])
    correlations, clear, kept = [], 0, 0
    for query in ASKED:
        a, b = (np.array(scores_of(r, query, ANSWERS, "probability")) for r in (ranker, int8))
        correlations.append(spearmanr(a, b)[0])
        apart = a[:, None] - a[None, :] > (a.max() - a.min()) / 3
        clear += apart.sum()
        kept += (apart & (b[:, None] > b[None, :])).sum()
        assert np.abs(a - b).max() < (a.max() - a.min()) / 2
    assert np.mean(correlations) > least, np.mean(correlations)
    assert clear > 50 and kept == clear  # of pairs that the model tells clearly apart, none changes places


def test_int8_of_nano_is_small_and_answers_in_eight_languages():
    folder = exported("nano")
    sizes = [(folder / name).stat().st_size for name in FILES]
    assert sizes[1] < 0.4 * sizes[0]
    int8 = querit.load(folder / FILES[1])
    wrong = [query for query, answers in ASKED.items() if int8(query, ANSWERS, top_k=1)[0]["index"] not in answers]
    assert len(wrong) <= 2, wrong


# ---------------------------------------------------------------- the folder


def test_the_record_says_what_was_kept():
    record = read_json(exported("bert") / "export.json")
    assert record["keeps"][FILES[0]] == {"order": "the same", "score": "the same", "probability": "the same"}
    assert record["keeps"][FILES[1]]["order"] == "nearly"
    assert record["checked"][FILES[0]]["largest_difference_of_a_logit"] < 1e-4
    ranker = pipeline("text-ranking", model=str(folder_of("bert")), trust_remote_code=True, dtype=torch.float32)
    int8 = querit.load(exported("bert") / FILES[1])
    probes: dict[str, list] = {}
    for probe in record["probes"]:
        probes.setdefault(probe["query"], []).append(probe)
    moved = 0.0
    for query, rows in probes.items():
        documents = [row["document"] for row in rows]
        expected = scores_of(ranker, query, documents, "probability")
        assert [row["probability"] for row in rows] == pytest.approx(expected, abs=1e-5)
        moved = max(moved, np.abs(np.subtract(scores_of(int8, query, documents, "probability"), expected)).max())
    told = record["checked"][FILES[1]]["largest_difference_of_a_probability"]
    assert told == pytest.approx(moved, abs=0.02)  # int8 depends on the batch


def test_the_files_hold_no_path_and_no_code():
    folder = exported("bert")
    root = str(Path(querit.__file__).parent).encode()
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.suffix in {".json", ".md", ".onnx"} or path.name == "LICENSE", path
            content = path.read_bytes()
            assert root not in content and b"site-packages" not in content and str(SCRATCH).encode() not in content
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"] and config["num_labels"] == 1
    assert not {"auto_map", "custom_pipelines"} & config.keys()
    for name in FILES:
        onnx.checker.check_model(onnx.load(folder / name))


ALONE = """
import sys
for name in ("torch", "transformers", "onnx"):
    sys.modules[name] = None  # as if it were not installed
exec(sys.argv[1])
print(probabilities.tolist())
"""


@pytest.mark.parametrize("kind", ["bert", "nano"])
def test_the_readmes_code_needs_onnxruntime_and_tokenizers_alone(kind):
    folder = exported(kind)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    command = [sys.executable, "-c", ALONE, code]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120).stdout
    source = NANO if kind == "nano" else folder_of(kind)
    ranker = pipeline("text-ranking", model=str(source), trust_remote_code=True, dtype=torch.float32)
    expected = scores_of(ranker, "Why does the sea rise?", ["The Moon pulls on it.", "Salt."], "probability")
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- the commands, and errors: nothing is left behind


def test_export_and_rank_on_the_command_line(tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, ["export", str(folder_of("bert")), str(out), "--to", "onnx"])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "notes.txt").write_text("\n".join(text for text in DOCUMENTS if text), encoding="utf-8")
    rankings = []
    for model in (folder_of("bert"), *(out / name for name in FILES)):
        command = ["rank", QUERY, str(tmp_path / "notes.txt"), "--model", str(model), "--json"]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        rankings.append({row["document"]: row["probability"] for row in rows})
    assert rankings[1] == pytest.approx(rankings[0], abs=2e-2)  # the model may run in 16 bits
    assert rankings[2] == pytest.approx(rankings[0], abs=0.2)


@pytest.mark.parametrize("kind", ["qwen3", "deepseek_v3"])
def test_a_causal_model_is_told(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"causal {kind}.*--to vllm"):
        export(folder_of(kind), tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_kind_or_a_tokenizer_of_another_kind_is_told(tmp_path):
    source = shutil.copytree(folder_of("bert"), tmp_path / "source")
    # With a chat template, the pipeline's prompt is no longer what the tokenizer makes of a pair by itself.
    (source / "chat_template.jinja").write_text(
        "{{ messages[0].content }} | {{ messages[1].content }}[SEP]", encoding="utf-8"
    )
    with pytest.raises(ValueError, match="needs a pair template of its own"):
        export(source, tmp_path / "out", "onnx")
    (source / "chat_template.jinja").unlink()
    (source / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="no Querit reranker"):
        export(source, tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx", "onnxscript"])
def test_without_the_extra_the_command_names_it(tmp_path, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from querit import cli; cli.app()"
    command = [sys.executable, "-c", code, "export", str(folder_of("bert")), str(tmp_path / "out"), "--to", "onnx"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "querit-reranker[onnx]" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


def test_ranking_with_no_file_a_broken_one_or_one_of_another_model(tmp_path):
    folder = shutil.copytree(exported("bert"), tmp_path / "out")
    (folder / "onnx" / "broken.onnx").write_bytes(b"not a model")
    other = onnx.load(folder / FILES[0])
    other.graph.output[0].name = other.graph.node[-1].output[0] = "scores"
    onnx.save(other, folder / "onnx" / "other.onnx")
    (tmp_path / "notes.txt").write_text("A line.\n")
    for name, message in (("none", "is not there"), ("broken", "does not load"), ("other", "no export of a Querit")):
        file = folder / "onnx" / f"{name}.onnx"
        result = CliRunner().invoke(cli.app, ["rank", "q", str(tmp_path / "notes.txt"), "--model", str(file)])
        assert result.exit_code == 1 and message in result.output, result.output
    with pytest.raises(FileNotFoundError, match="folder of an export"):
        OnnxReranker(shutil.copy(folder / FILES[0], tmp_path / "alone.onnx"))


def test_limits_of_the_tokenizer_hold(tmp_path):
    ranker = querit.load(exported("bert") / FILES[0])
    assert ranker.max_length == MAX_LENGTH
    assert [row["truncated"] for row in ranker(QUERY, ["oil " * 2000, "oil"])].count(True) == 1
