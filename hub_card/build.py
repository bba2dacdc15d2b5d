"""A trained checkpoint -> the exact folder that is uploaded. The same input gives the same bytes.

querit build runs/querit-nano/calibrated hub_card/querit-reranker-nano \\
    --max-length 512 --results recipes/querit-nano/results/dev
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, yaml_dump
from transformers import PreTrainedTokenizerBase

from hub_card.convert import NO_LABELS, check_ids, check_not_here, check_weight_files, read_tokenizer, write_json
from hub_card.from_sentence_transformers import load_checkpoint
from hub_card.probes import write_probes
from hub_card.provenance import RELIABILITY, merges_of, write_merges
from hub_card.sentence_transformers_files import write_sentence_transformers_files
from modeling_querit.modeling_querit import POOLER_MODEL_TYPE
from querit.loading import folder_of

LICENSE = Path(__file__).with_name("templates") / "LICENSE"  # the repository's own, word for word
SUMS, RESULTS_FOLDER = "SHA256SUMS", ".eval_results"
HANDLER = Path(__file__).parent / "templates" / "handler.py"  # for Inference Endpoints
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What the Hub's clients put beside a folder's files, and nobody publishes.
NOT_RELEASED = [*DEFAULT_IGNORE_PATTERNS, ".gitattributes"]


def build(
    checkpoint: str | Path,
    folder: Path,
    card: str | Callable[[Path], str],
    max_length: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> Path:
    """Write `folder` whole or not at all, and return it; what stood there before goes once the new one stands.

    Args:
        checkpoint: a folder (a release is one too, and what sentence-transformers saved of one), or a Hub id at
            `revision`.
        card: the text of README.md, or what writes it when all but it stands, from the folder that it is given.
        max_length: in tokens; becomes the tokenizer's: every engine cuts pairs there, whatever the positions allow.
        dtype: of the weights. What an architecture keeps in float32, such as DeepSeek-V3's router bias, stays so.
        max_shard_size: weights above it are split over several files.

    Raises OSError or ValueError, naming the fix, for a checkpoint that is none, and for a `folder` that holds something
    else than a model, which would be lost.
    """
    folder = Path(folder)
    source = folder_of(str(checkpoint), revision)
    check_target(source, folder)
    check_weight_files(source)
    tokenizer = read_tokenizer(source)
    model = load_checkpoint(source, dtype)
    check_ids(tokenizer, len(model.get_input_embeddings().weight), source)  # type: ignore[arg-type]
    positions = getattr(model.config, "max_position_embeddings", None)
    own = tokenizer.model_max_length  # of some that is beyond their positions, and cuts nothing
    if max_length and positions and max_length > positions and max_length != own:
        raise ValueError(f"max_length={max_length} is over the {positions} positions that the model has. Lower it.")
    tokenizer.model_max_length = max_length or own
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # sentence-transformers pads by it
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        built = Path(scratch) / folder.name
        model.save_pretrained(built, max_shard_size=max_shard_size)
        write_release_config(built)
        save_tokenizer(tokenizer, built)
        if model.config.model_type != POOLER_MODEL_TYPE:  # which sentence-transformers reads by itself
            write_sentence_transformers_files(
                built, model.head.weight, model.head.bias, model.pooling, chat_template=bool(tokenizer.chat_template)
            )
        del model
        shutil.copyfile(LICENSE, built / "LICENSE")
        shutil.copyfile(HANDLER, built / HANDLER.name)
        copy_provenance(source, built)
        text = card if isinstance(card, str) else card(built)
        (built / "README.md").write_text(text, encoding="utf-8")
        write_results(ModelCard(text), built)
        write_probes(built)
        for file in built.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes them for the owner alone
        (built / SUMS).write_text(sums_of(built), encoding="utf-8")
        replace(folder, built, Path(scratch))
    return folder


def check_target(source: Path, folder: Path) -> None:
    check_not_here(folder)
    if folder.resolve() in source.resolve().parents:
        raise ValueError(f"{folder} holds the checkpoint, which would be lost. Give another folder to build.")
    used = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if used and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model, and would be replaced. Remove it, or give another folder.")
    if (folder / ".git").exists():
        raise ValueError(
            f"{folder} is a git repository, which would be lost. Build another folder, and copy its files."
        )


def write_release_config(folder: Path) -> None:
    """Beside the two-way head, config.json says that there are no labels: see NO_LABELS."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["model_type"] != POOLER_MODEL_TYPE:
        write_json(path, config | NO_LABELS)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "auto_map"):  # how it was loaded here, and code that is not published
        config.pop(key, None)
    if not tokenizer.chat_template and config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4, which 5 knows too
        config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def copy_provenance(source: Path, folder: Path) -> None:
    """What the recipe's stages wrote beside the model for its card, without the paths of the machine that merged."""
    merges = merges_of(source)
    for merge in merges:
        for entry in (*merge["models"], *merge["steps"]):
            entry["model"] = Path(entry["model"]).name
    write_merges(folder, merges)
    if (source / RELIABILITY).is_file():
        shutil.copyfile(source / RELIABILITY, folder / RELIABILITY)


def results_of(card: ModelCard) -> dict[str, str]:
    """The card's results on data sets of the Hub, as the Hub's files of results: name -> content.

    Form: https://huggingface.co/docs/hub/eval-results.
    """
    files = {}
    for result in card.data.get("eval_results") or []:
        if "/" not in result.dataset_type:
            continue
        arguments = {"metric": result.metric_name or result.metric_type, **(result.dataset_args or {})}
        entry = EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=result.dataset_name,
            value=result.metric_value,
            dataset_revision=result.dataset_revision,
            source_name=result.source_name,
            source_url=result.source_url,
            notes=", ".join(f"{key}: {value}" for key, value in arguments.items()),
        )
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in result.dataset_name)
        files[f"{name}.yaml"] = yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def write_results(card: ModelCard, folder: Path) -> None:
    for name, content in results_of(card).items():
        (folder / RESULTS_FOLDER).mkdir(exist_ok=True)
        (folder / RESULTS_FOLDER / name).write_text(content, encoding="utf-8")


def files_of(folder: Path) -> list[str]:
    """Paths of a release's files, SHA256SUMS apart, in order."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(set(filter_repo_objects(paths, ignore_patterns=NOT_RELEASED)) - {SUMS})


def file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path) -> str:
    """The content of SHA256SUMS, as `sha256sum -c` reads it."""
    return "".join(f"{file_sum(folder / path)}  {path}\n" for path in files_of(folder))


def replace(folder: Path, built: Path, scratch: Path) -> None:
    aside = scratch / "replaced"  # removed with the scratch folder
    if folder.exists():
        folder.rename(aside)
    try:
        built.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
