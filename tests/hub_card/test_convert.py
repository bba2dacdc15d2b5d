"""Checkpoints as published, generated small, against a forward pass written here with plain transformers."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    pipeline,
)
from transformers.core_model_loading import revert_weight_conversion

from hub_card.convert import INDEX, convert
from modeling_querit.modeling_querit import QueritForSequenceClassification
from tests.models_for_tests import CAUSAL_KINDS, SCRATCH, tiny_config, tokenizer_of

CAUSAL_LM = {"qwen3": Qwen3ForCausalLM, "deepseek_v3": DeepseekV3ForCausalLM}
ARCHITECTURE = {"qwen3": "MLQwen3Model", "deepseek_v3": "QueritModel"}
MAX_LENGTH = 128
TOLERANCE = 2e-5
QUERY = "What does a bicycle need?"
DOCUMENTS = [
    "A bicycle needs oil on the chain.",
    "The lighthouse keeper wrote the weather down.",
    "图书馆每天早上九点开门，周末休息。",
    "Prices in 2024: $1,299.00, i.e. -10.4%; 😀",
    "x",
    "",
]
PROMPT = "Judge whether the Content meets the requirements based on the Query. Query: {}; Content: {}"


@cache
def backbone_and_head(kind: str) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """A causal language model, and a head. Its weights are large enough that a score depends on every token."""
    torch.manual_seed(7)
    model = CAUSAL_LM[kind](tiny_config(kind, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model, 0.3 * torch.randn(2, model.config.hidden_size), torch.tensor([0.2, -0.1])


def publish(folder: Path, kind: str, lm_head: str = "absent", sharded: bool = True) -> Path:
    """A folder laid out as published: the head in the last shard, no auto_map, the backbone's own chat template."""
    model, weight, bias = backbone_and_head(kind)
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    tokenizer = tokenizer_of(kind)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    edit_json(folder / "tokenizer_config.json", model_max_length=MAX_LENGTH, chat_template="{{ messages }}")
    edit_json(folder / "config.json", architectures=[ARCHITECTURE[kind]], tie_word_embeddings=lm_head == "tied")
    shards = sorted(folder.glob("*.safetensors"))
    assert (len(shards) > 2) == sharded
    for shard in shards:
        state = load_file(shard)
        if lm_head != "present":
            state.pop("lm_head.weight", None)
        if shard == shards[-1]:
            state |= {"head.weight": weight, "head.bias": bias}
        shard.unlink()
        if state:
            save_file(state, shard, {"format": "pt"})
    write_index(folder)
    return folder


def write_index(folder: Path) -> None:
    if (folder / INDEX).exists():
        shards = sorted(folder.glob("*.safetensors"))
        edit_json(folder / INDEX, weight_map={key: shard.name for shard in shards for key in load_file(shard)})


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    """Apply a change to the tensors of every file, and correct the index."""
    for shard in folder.glob("*.safetensors"):
        state = load_file(shard)
        change(state)
        save_file(state, shard, {"format": "pt"})
    write_index(folder)


@cache
def published(kind: str) -> Path:
    return publish(SCRATCH / "published" / kind, kind)


@cache
def converted(kind: str) -> Path:
    return convert(published(kind), SCRATCH / "converted" / kind)


@cache
def ranker(folder: Path):
    return pipeline("text-ranking", model=str(folder), trust_remote_code=True, device="cpu")  # type: ignore[call-overload]


def cross_encoder(folder: Path, **options):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu", local_files_only=True, **options)


def plain_scores(kind: str, query: str, documents: list[str]) -> list[float]:
    """p1 - p0 as the model card has it: the prompt as one string, `[CLS]` appended, its final hidden state."""
    model, weight, bias = backbone_and_head(kind)
    tokenizer = tokenizer_of(kind)
    scores = []
    for document in documents:
        text = PROMPT.format(query, document)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids("[CLS]")]
        with torch.inference_mode():
            hidden_states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
            p0, p1 = torch.softmax(weight @ hidden_states[0, -1] + bias, dim=0)
        scores.append((p1 - p0).item())
    return scores


def by_index(results: list[dict], key: str = "score") -> list[float]:
    return [result[key] for result in sorted(results, key=lambda result: result["index"])]


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_scores_are_those_of_plain_transformers(kind):
    expected = plain_scores(kind, QUERY, DOCUMENTS)
    assert max(expected) - min(expected) > 0.05  # they say something
    assert by_index(ranker(converted(kind))(QUERY, DOCUMENTS)) == pytest.approx(expected, abs=TOLERANCE)

    tokenizer = AutoTokenizer.from_pretrained(converted(kind))
    texts = [PROMPT.format(QUERY, document) + "[CLS]" for document in DOCUMENTS]
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    for auto in (AutoModel, AutoModelForSequenceClassification):
        model = auto.from_pretrained(converted(kind), trust_remote_code=True).eval()
        with torch.inference_mode():
            scores = model(**encoded).score.squeeze(-1).tolist()
        assert scores == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("lm_head", ["tied", "present", "absent"])
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_lm_head_and_shards_make_no_difference(kind, lm_head, sharded, tmp_path):
    folder = convert(publish(tmp_path / "in", kind, lm_head, sharded), tmp_path / "out")
    model, info = QueritForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}
    source, weight, bias = backbone_and_head(kind)
    expected = {f"model.{key}": value for key, value in source.model.state_dict().items()}
    expected |= {"head.weight": weight, "head.bias": bias}
    assert expected.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_folder(kind):
    source, folder = published(kind), converted(kind)
    config = AutoConfig.from_pretrained(folder)
    # No labels: an engine that knows only the backbone would else rank with a head of random weights.
    assert (config.model_type, config.num_labels, config.classifier_pooling) == (kind, 0, "last")
    raw, before = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    assert raw["architectures"] == ["QueritForSequenceClassification"]
    assert set(raw["auto_map"]) == {"AutoModel", "AutoModelForSequenceClassification"}
    assert raw["custom_pipelines"]["text-ranking"]["impl"] == "pipeline_querit.TextRankingPipeline"
    changed = {"architectures", "id2label", "label2id"}
    assert all(raw[key] == value for key, value in before.items() if key not in changed)
    for file in source.glob("*.safetensors*"):
        assert (folder / file.name).stat().st_ino == file.stat().st_ino
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "query", "content": "a"}, {"role": "document", "content": "b"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == PROMPT.format("a", "b") + "[CLS]"
    assert [*folder.parent.glob(".*")] == []  # nothing of the making is left


def test_copies_where_links_cannot_be_made_and_follows_symbolic_ones(tmp_path, monkeypatch):
    source = tmp_path / "snapshot"  # as the Hub's cache: names that point to blobs
    source.mkdir()
    for file in published("qwen3").iterdir():
        (source / file.name).symlink_to(file)
    linked = convert(source, tmp_path / "linked")

    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = convert(source, tmp_path / "deep" / "copied")
    for file in published("qwen3").glob("*.safetensors*"):
        for folder in (linked, copied):
            assert not (folder / file.name).is_symlink()
            assert (folder / file.name).read_bytes() == file.read_bytes()
    umask = os.umask(0o022)
    os.umask(umask)
    assert copied.stat().st_mode & 0o777 == 0o777 & ~umask  # not private, as temporary folders are


def test_a_missing_pad_token_and_licence(tmp_path):
    source = shutil.copytree(published("deepseek_v3"), tmp_path / "in")
    edit_json(source / "tokenizer_config.json", pad_token=None)
    (source / "LICENSE").write_text("Apache-2.0")
    folder = convert(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).pad_token == AutoTokenizer.from_pretrained(folder).eos_token
    assert (folder / "LICENSE").read_text() == "Apache-2.0"
    assert cross_encoder(folder).predict([(QUERY, document) for document in DOCUMENTS]) == pytest.approx(
        by_index(ranker(converted("deepseek_v3"))(QUERY, DOCUMENTS), "probability"), abs=TOLERANCE
    )


def test_layers_that_transformers_ignores_may_stay(tmp_path):
    source = shutil.copytree(published("deepseek_v3"), tmp_path / "in")
    added("model.layers.61.eh_proj.weight")(source)
    convert(source, tmp_path / "out")


# -- refusals --------------------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda state: state.pop(key, None))


def replaced(key: str, *shape: int) -> Callable[[Path], None]:
    def change(state: dict) -> None:
        if key in state:
            state[key] = torch.zeros(shape)

    return lambda folder: edit_weights(folder, change)


def added(key: str) -> Callable[[Path], None]:
    """The tensor goes to the file that holds the head."""

    def change(state: dict) -> None:
        if "head.bias" in state:
            state[key] = torch.zeros(2)

    return lambda folder: edit_weights(folder, change)


def config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def pickles_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_weights(folder: Path) -> None:
    pickles_only(folder)
    (folder / "pytorch_model.bin").unlink()


def truncated(folder: Path) -> None:
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 1)


def header_beyond_the_file(folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", 10**6) + b"{}")


def index_of_another_folder(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"head.bias": "../other.safetensors"})


def index_that_disagrees(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"model.norm.weight": first_shard(folder).name, "x": "y"})
    shutil.copy(first_shard(folder), folder / "y")


def without_cls(folder: Path) -> None:
    edit_tokens(folder, lambda tokens: [token for token in tokens if token["content"] != "[CLS]"])


def ids_beyond(folder: Path) -> None:
    extra = {"id": len(tokenizer_of("qwen3")), "content": "<extra>"}
    edit_tokens(folder, lambda tokens: [*tokens, tokens[-1] | extra])


def edit_tokens(folder: Path, change: Callable[[list], list]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = change(content["added_tokens"])
    path.write_text(json.dumps(content))


Refusal = tuple[str, Callable[[Path], object], type[Exception], str]
REFUSALS: dict[str, Refusal] = {
    "no config": ("qwen3", lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"no config\.json"),
    "config no JSON": ("qwen3", lambda folder: (folder / "config.json").write_text("{"), ValueError, "no JSON"),
    "architecture": ("qwen3", config(architectures=["LlamaForCausalLM"]), ValueError, "Llama.*convert knows MLQwen3"),
    "model_type": ("qwen3", config(model_type="llama"), ValueError, "model_type 'llama'.* knows qwen3, deepseek_v3"),
    "no model_type": ("qwen3", config(model_type=None), ValueError, "model_type None"),
    "hub folder": ("qwen3", config(architectures=["QueritForSequenceClassification"]), ValueError, "folder already"),
    "no head": ("qwen3", without("head.weight"), ValueError, r"no head\.weight"),
    "no bias": ("deepseek_v3", without("head.bias"), ValueError, r"no head\.bias"),
    "one label": ("qwen3", replaced("head.weight", 1, 48), ValueError, r"head\.weight .*\[1, 48\]; .*\[2, 48\]"),
    "no norm": ("qwen3", without("model.norm.weight"), ValueError, r"lacks model\.norm\.weight"),
    "no expert": (
        "deepseek_v3", without("model.layers.1.mlp.experts.3.up_proj.weight"), ValueError,
        r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight\.",
    ),
    "more layers told": (
        "qwen3", config(num_hidden_layers=4, layer_types=None), ValueError, r"lacks model\.layers\.2.* and \d+ more"
    ),
    "unexpected": ("qwen3", added("model.layers.0.x.weight"), ValueError, r"has model\.layers\.0\.x\.weight"),
    "fewer layers told": ("deepseek_v3", config(num_hidden_layers=1), ValueError, r"has model\.layers\.1"),
    "width": ("qwen3", config(intermediate_size=80), ValueError, r"another shape.*\[96, 48\] for \[80, 48\]"),
    "pickles": ("qwen3", pickles_only, ValueError, r"pickles \(pytorch_model\.bin\).*safetensors"),
    "no weights": ("qwen3", no_weights, FileNotFoundError, r"neither model\.safetensors nor"),
    "missing shard": ("qwen3", lambda folder: first_shard(folder).unlink(), FileNotFoundError, "names .*t there"),
    "truncated": ("deepseek_v3", truncated, ValueError, r"model-\d+-of-.* truncated"),
    "header": ("qwen3", header_beyond_the_file, ValueError, r"model-\d+-of-.* truncated"),
    "index no JSON": ("qwen3", lambda folder: (folder / INDEX).write_text("[]"), ValueError, "no safetensors index"),
    "index outside": ("qwen3", index_of_another_folder, ValueError, "another folder"),
    "index disagrees": ("qwen3", index_that_disagrees, ValueError, "disagree on"),
    "no tokenizer": ("qwen3", lambda folder: (folder / "tokenizer.json").unlink(), ValueError, "tokenizer"),
    "no [CLS]": ("qwen3", without_cls, ValueError, r"no added token \[CLS\]"),
    "ids beyond": ("qwen3", ids_beyond, ValueError, r"beyond the \d+ rows of the embeddings: <extra>"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name, tmp_path):
    kind, spoil, error, message = REFUSALS[name]
    source = shutil.copytree(published(kind), tmp_path / "in")
    spoil(source)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "out" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_refuses_folders(tmp_path):
    source = shutil.copytree(published("qwen3"), tmp_path / "in")
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="output is the source"):
        convert(source, tmp_path / "x" / ".." / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for output in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(FileExistsError, match="Remove it or give another"):
            convert(source, output)
    (tmp_path / "empty").mkdir()
    assert (convert(source, tmp_path / "empty") / "config.json").is_file()


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hub_card.convert.copy_remote_code", fail)
    with pytest.raises(OSError, match="No space"):
        convert(published("qwen3"), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


# -- memory ----------------------------------------------------------------------------------------------------------

# Weights that are stored as they are used stay pages of the mapped file, which are counted when they are touched. Those
# that are joined, the experts, are copied: that is anonymous memory. The pages that they were copied from are clean and
# mapped, so they count as resident, but the system takes them back when it needs room: they are no demand on memory.
# /proc has no peak of anonymous memory, so a thread watches it; its peak of all resident memory is the first folder's.
LOAD = """
import json, sys, threading, time
import transformers.models.deepseek_v3.modeling_deepseek_v3, transformers.models.qwen3.modeling_qwen3
from transformers import AutoModelForSequenceClassification, dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE, tiny, *folders = sys.argv[1:]

def memory(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], memory("RssAnon"))

AutoModelForSequenceClassification.from_pretrained(tiny, trust_remote_code=True)  # imports what loading imports
result = []
for folder in folders:
    done, start, resident = threading.Event(), memory("RssAnon"), memory("VmRSS")
    peak = [start]
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    done.set()
    watcher.join()
    sum(parameter.sum() for parameter in model.parameters())
    result.append([max(peak[0], memory("RssAnon")) - start, memory("VmHWM") - resident])
    del model
print(json.dumps(result))
"""
LARGE = {  # some 115 MB each, quick to write; many layers, since a layer's experts are joined at a time
    "qwen3": dict(hidden_size=640, intermediate_size=2560, num_hidden_layers=12, layer_types=["full_attention"] * 12),
    "deepseek_v3": dict(hidden_size=384, moe_intermediate_size=256, n_routed_experts=16, num_hidden_layers=13),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_of_loading(tmp_path):
    folders = {}
    for kind, changes in LARGE.items():
        source = tmp_path / kind
        tokenizer_of(kind).save_pretrained(source)
        config = tiny_config(kind, dtype=torch.bfloat16, architectures=[ARCHITECTURE[kind]], **changes)
        config.to_json_file(source / "config.json")
        with torch.device("meta"):
            model = QueritForSequenceClassification(config)
        state = revert_weight_conversion(model, model.state_dict())
        state = {key: torch.full(value.shape, 0.01, dtype=torch.bfloat16) for key, value in state.items()}
        save_file(state, source / "model.safetensors", {"format": "pt"})
        folders[kind] = convert(source, tmp_path / f"{kind}-out")
    # glibc keeps freed pieces of under 32 MB to itself. At full size those of a layer's experts are far larger.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        LOAD,
        str(tmp_path / "modules"),
        str(converted("qwen3")),
        *map(str, folders.values()),
    ]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    for (kind, folder), (anonymous, resident) in zip(folders.items(), json.loads(output), strict=True):
        size = (folder / "model.safetensors").stat().st_size
        print(f"{kind}: {size / 2**20:.0f} MB, anonymous {anonymous / size:.3f}, resident {resident / size:.3f}")
        assert size > 100 * 2**20  # the few MB that any loading takes are small beside it
        assert anonymous <= 1.15 * size
        if kind == "qwen3":
            assert 0.95 * size < resident <= 1.15 * size
