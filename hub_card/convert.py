"""A checkpoint laid out as Querit publishes it -> a hub folder that transformers and sentence-transformers load."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

import modeling_querit
from hub_card.cut import check_cut
from hub_card.sentence_transformers_files import write_sentence_transformers_files
from modeling_querit.modeling_querit import QueritForSequenceClassification, copy_remote_code, remote_code_config

MODEL_TYPES = ("qwen3", "deepseek_v3")
# Names seen or likely in a published config.json. What the backbone is, `model_type` and the keys say.
ARCHITECTURES = (
    "MLQwen3Model", "MLDeepseekV3Model", "QueritModel",
    "Qwen3Model", "Qwen3ForCausalLM", "DeepseekV3Model", "DeepseekV3ForCausalLM",
)  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
LEGAL_FILES = ("LICENSE*", "NOTICE*")
CLS = "[CLS]"
LFS_POINTER = b"version https://git-lfs"
CHAT_TEMPLATE = Path(modeling_querit.__file__).with_name("chat_template.jinja")
# To engines that know the backbone and not the two-way head, such as sentence-transformers before 6 and
# AutoModelForSequenceClassification without trust, one label would mean a head of random weights, which ranks. With
# none they give no score, and `rank` refuses. Our class and the modules for sentence-transformers do not ask.
NO_LABELS: dict = {"id2label": {}, "label2id": {}}

Shape = tuple[int, ...]


def convert(source: Path, output: Path) -> Path:
    """Write the hub folder `output` of the published checkpoint folder `source`, and return it.

    The weights' files are hard links to the source's where the file system can, copies elsewhere: to edit them in place
    would edit the source. No weight is loaded but the head. All is checked first, and `output` appears complete or not
    at all.

    Raises FileNotFoundError, FileExistsError or ValueError, naming what is wrong and the fix, for an `output` in use
    and for a source that is no such checkpoint: another architecture, keys missing, unexpected or of another shape,
    weights missing, damaged or pickled, a tokenizer without `[CLS]` or with ids beyond the embeddings.
    """
    source, output = Path(source), Path(output)
    check_folders(source, output)
    raw_config = read_config(source)
    files = weight_files(source)
    shapes, places = read_headers(files)
    check_keys(source, shapes)
    tokenizer = load_tokenizer(source, rows=shapes["model.embed_tokens.weight"][0])
    head_weight, head_bias = (read_tensor(places[key], key) for key in ("head.weight", "head.bias"))

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        for file in files:
            link_or_copy(file, folder / file.name)
        write_config(raw_config, folder)
        copy_tokenizer(source, folder, tokenizer)
        for pattern in LEGAL_FILES:
            for file in source.glob(pattern):
                shutil.copy2(file, folder / file.name)
        copy_remote_code(folder)
        write_sentence_transformers_files(folder, head_weight, head_bias, pooling="last", chat_template=True)
        os.replace(folder, output)
    return output


def check_folders(source: Path, output: Path) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder {source}. Give the folder of a downloaded checkpoint.")
    if source.resolve() == output.resolve():
        raise ValueError(f"The output is the source, {source}. Give another folder: the source is never changed.")
    check_not_here(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Remove it or give another output.")


def check_not_here(output: Path) -> None:
    """A folder appears whole by taking the place of what stood there: of one that a shell is in, it cannot."""
    if output.resolve() == Path.cwd():
        raise ValueError(f"{output} is the folder that you are in, and cannot be replaced. Give another one.")


def read_config(source: Path) -> dict:
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no config.json. Give the folder of a downloaded checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Download it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object. Download it again.")
    architectures = config.get("architectures") or []
    if QueritForSequenceClassification.__name__ in architectures:
        raise ValueError(f"{source} is a hub folder already: use it as it is.")
    unknown = [name for name in architectures if name not in ARCHITECTURES]
    if unknown:
        raise ValueError(
            f"{path} names the architecture {', '.join(map(str, unknown))}; convert knows {', '.join(ARCHITECTURES)}. "
            "Is this a Querit checkpoint?"
        )
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{path} has the model_type {config.get('model_type')!r}; convert knows {', '.join(MODEL_TYPES)}. "
            "Is this a Querit checkpoint?"
        )
    return config


def weight_files(source: Path) -> list[Path]:
    """The safetensors files to publish, with their index if there are several."""
    if (source / WEIGHTS).is_file():  # transformers, too, prefers it to an index
        return [source / WEIGHTS]
    index = source / INDEX
    if not index.is_file():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in source.glob(pattern))
        if pickled:
            raise ValueError(
                f"{source} has its weights only as pickles ({', '.join(pickled[:3])}), which can run code when loaded. "
                "Save them as safetensors first."
            )
        raise FileNotFoundError(f"{source} has neither {WEIGHTS} nor {INDEX}. Download the weights.")
    names = sorted(set(read_index(index).values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which lies in another folder. Use the index as published.")
        if not (source / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there. Download it.")
    return [index, *(source / name for name in names)]


def check_weight_files(source: Path) -> None:
    """Raise ValueError or FileNotFoundError where weights are missing, cut off, or a pointer of Git LFS."""
    read_headers(weight_files(source))


def read_index(path: Path) -> dict[str, str]:
    try:
        return {str(key): str(file) for key, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no safetensors index with a weight_map. Download it again.") from None


def read_headers(files: list[Path]) -> tuple[dict[str, Shape], dict[str, Path]]:
    """Shape and file of each tensor, from the files' headers alone."""
    shapes: dict[str, Shape] = {}
    places: dict[str, Path] = {}
    for file in files:
        if file.name == INDEX:
            continue
        try:
            with safe_open(file, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - a safe_open is no mapping
                    shapes[key], places[key] = tuple(weights.get_slice(key).get_shape()), file
        except SafetensorError as error:
            if file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
                raise ValueError(
                    f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` in its repository, or `hf "
                    "download`."
                ) from None
            raise ValueError(f"{file} is truncated or no safetensors file ({error}). Download it again.") from None
    if files[0].name == INDEX:
        found = {key: file.name for key, file in places.items()}
        wrong = sorted({key for key, _ in read_index(files[0]).items() ^ found.items()})
        if wrong:
            raise ValueError(f"{files[0]} and its files disagree on {listed(wrong)}. Download both again.")
    return shapes, places


def read_tensor(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(key)


def check_keys(source: Path, found: dict[str, Shape]) -> None:
    """Compare a checkpoint's tensors with those that this architecture saves; nothing of it is in memory."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    head = {"head.weight": (2, config.hidden_size), "head.bias": (2,)}
    for key, shape in head.items():
        if key not in found:
            raise ValueError(f"{source} has no {key}: a backbone without the relevance head. Give a Querit checkpoint.")
        if found[key] != shape:
            raise ValueError(f"{key} has the shape {[*found[key]]}; Querit's head has {[*shape]}. Give its checkpoint.")
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"{source} lacks {listed(missing)}. Download it again, or correct its config.json.")
    # What transformers leaves out by itself, such as the layer for multi-token prediction of DeepSeek-V3.
    backbone: Any = AutoModel._model_mapping[type(config)]
    ignored = [r"^lm_head\.weight$", *(backbone._keys_to_ignore_on_load_unexpected or ())]
    unexpected = sorted(
        key for key in found.keys() - expected.keys() if not any(re.search(pattern, key) for pattern in ignored)
    )
    if unexpected:
        raise ValueError(
            f"{source} has {listed(unexpected)}, which a {config.model_type} with its config.json does not. "
            "Loading would leave them out in silence: correct config.json or the weights."
        )
    reshaped = [f"{key} {[*found[key]]} for {[*shape]}" for key, shape in expected.items() if found[key] != shape]
    if reshaped:
        raise ValueError(f"{source} has weights of another shape than config.json says: {listed(reshaped)}.")


def expected_shapes(config: PreTrainedConfig) -> dict[str, Shape]:
    """The tensors, as they are saved, of the reranker with this config; nothing of it is in memory."""
    with torch.device("meta"):
        model = QueritForSequenceClassification(config)
    # In memory the experts of a layer are one tensor, on disk there is one for each.
    return {key: tuple(value.shape) for key, value in revert_weight_conversion(model, model.state_dict()).items()}


def read_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer. ValueError where its files are damaged, or are not all there.

    Of fewer files transformers makes one that reads the same text otherwise, or knows no word, without saying so.
    """
    names = "tokenizer.json and tokenizer_config.json"
    for name in names.split(" and "):
        path = source / name
        if path.is_file() and path.open("rb").read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS: run `git lfs pull` in its repository, or `hf download`.")
    if not (source / "tokenizer_config.json").is_file():
        raise ValueError(f"{source} has no tokenizer_config.json, which says how text is read. Download {names}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # those of tokenizers have no class of their own
        words = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise ValueError(f"{source} has no tokenizer that can be read ({words}). Download {names}.") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"The tokenizer of {source} knows no word: its vocabulary is missing. Download {names}.")
    return tokenizer


def load_tokenizer(source: Path, rows: int) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(source)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if CLS not in added:
        raise ValueError(
            f"The tokenizer of {source} has no added token {CLS}, which the score is read at. Use the "
            "tokenizer published with the checkpoint."
        )
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    check_cut(tokenizer)
    check_ids(tokenizer, rows, source)
    return tokenizer


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: int, source: Path) -> None:
    """ValueError where the tokenizer has tokens that the model has no embedding for."""
    beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        raise ValueError(
            f"The tokenizer of {source} has ids beyond the {rows} rows of the embeddings: {listed(beyond)}. Use the "
            "tokenizer published with the checkpoint."
        )


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link of the file itself, also where `source` is a symbolic link as in the Hub's cache, or a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def write_config(raw_config: dict, folder: Path) -> None:
    config = {
        **raw_config,
        "architectures": [QueritForSequenceClassification.__name__],
        **remote_code_config(),
        "classifier_pooling": "last",
        **NO_LABELS,
    }
    config.pop("num_labels", None)
    write_json(folder / "config.json", config)


def copy_tokenizer(source: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's files, with the ranking prompt in place of a chat template that the backbone may have had."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config.pop("chat_template", None)
    config.pop("auto_map", None)  # its code is not published here; transformers' own class loaded it
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        config["pad_token"] = tokenizer.eos_token  # sentence-transformers pads by it
    write_json(path, config)
    shutil.copyfile(CHAT_TEMPLATE, folder / CHAT_TEMPLATE.name)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
