"""Merge checkpoints that were trained from one base into one model, through mergekit, and check what came out.

    python -m recipes.merge --config recipes/querit-nano/5_merge.yaml

`slerp` is Querit's: one model after the other is merged into what stands, so the order matters. Each tensor is one
vector; with cos w = a.b / (|a| |b|) (Shoemake 1985, lengths kept):

    slerp(a, b; t) = (sin((1 - t) w) a + sin(t w) b) / sin w, and (1 - t) a + t b where |cos w| > 0.9995

The n-th model comes in with t = 1/n, which is the same weight for all. Between the steps nothing is rounded to 16 bits.
A tensor that is the same in all models, as in a model merged with itself, stays as it is, bit for bit.

The tensors are taken from the files by name, as `mergekit-pytorch` does, and merged by mergekit's own methods. Its
architecture-aware way (`mergekit-yaml`) asks transformers for the names instead: without our remote code that class
has no such head, and of DeepSeek-V3's split experts below a dense first layer it loses all, in silence.
"""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge_methods import merge_tensors
from mergekit.merge_methods.karcher import karcher_merge_tensors
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from trl import TrlParser

from hub_card.convert import check_weight_files, read_tokenizer
from hub_card.provenance import MERGE_RECORD, merges_of, write_merges
from modeling_querit.modeling_querit import QueritForSequenceClassification
from querit.files import appears_whole, file_hash
from recipes.lib.records import already_made

METHODS = ("slerp", "linear", "multislerp", "karcher")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LINEAR_COSINE = 0.9995  # mergekit's dot_threshold
SHARD_BYTES = 2 * 1000**3  # of the output; as much of it is held in memory
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
# These keys of config.json may differ: who wrote it, the code beside it, and what only generation reads, which the
# trainer sets to its tokenizer's. The tokenizers themselves are compared.
FREE_CONFIG = {"transformers_version", "_name_or_path", "dtype", "auto_map", "custom_pipelines"}
FREE_CONFIG |= {"use_cache", "bos_token_id", "eos_token_id"}


@dataclass
class MergeArguments:
    models: list[str] = field(metadata={"help": "Folders or Hub ids, two or more, in the order of merging."})
    output_dir: str = field(metadata={"help": "Folder to write; it appears only when complete and checked."})
    revisions: dict[str, str] = field(default_factory=dict, metadata={"help": "Hub id -> commit."})
    method: str = field(default="slerp", metadata={"help": "slerp (one by one), linear, multislerp or karcher."})
    t: list[float] = field(
        default_factory=list,
        metadata={"help": "slerp: how far each step goes to its model; 1/2, 1/3, ... if not given."},
    )
    weights: list[float] = field(
        default_factory=list, metadata={"help": "The other methods: weight of each model; equal if not given."}
    )
    first_only: list[str] = field(
        default_factory=list, metadata={"help": "Tensors with these in their name stay the first model's."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Of the arithmetic, float32 or float64; files keep theirs."}
    )


@dataclass
class Checkpoint:
    """A folder of weights, read one tensor at a time."""

    name: str  # as errors call it
    folder: Path
    loader: LazyTensorLoader
    shapes: dict[str, tuple[int, ...]]  # in the order of the files

    def __getitem__(self, tensor: str) -> torch.Tensor:
        return self.loader.get_tensor(tensor)  # type: ignore[return-value]


@dataclass
class Step:
    """What one step of slerp did to the tensors; `identical` ones stood there already."""

    model: str
    t: float
    linear_tensors: int = 0
    linear_parameters: int = 0
    identical_tensors: int = 0
    identical_parameters: int = 0

    def count_identical(self, tensor: torch.Tensor) -> None:
        self.identical_tensors += 1
        self.identical_parameters += tensor.numel()


def check_arguments(args: MergeArguments) -> None:
    if len(args.models) < 2:
        raise ValueError(f"models has {len(args.models)}; a merge takes two or more.")
    if args.method not in METHODS:
        raise ValueError(f"method is {args.method!r}; it must be one of {', '.join(METHODS)}.")
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype is {args.dtype!r}; the arithmetic is done in {' or '.join(DTYPES)}.")
    if unknown := set(args.revisions) - set(args.models):
        raise ValueError(f"revisions names {', '.join(sorted(unknown))}, which is not among the models.")
    if "" in args.first_only:
        raise ValueError("first_only has an empty name, which is in every tensor's: nothing would be merged.")
    if args.weights and args.method == "slerp":
        raise ValueError("slerp takes t, one number a step, and no weights.")
    if args.t and args.method != "slerp":
        raise ValueError(f"{args.method} takes weights, one a model, and no t.")
    if args.t and (len(args.t) != len(args.models) - 1 or not all(0 <= t <= 1 for t in args.t)):
        raise ValueError(f"t is {args.t}; it must be {len(args.models) - 1} numbers in [0, 1], one a step.")
    if args.weights and (len(args.weights) != len(args.models) or not all(0 < w < math.inf for w in args.weights)):
        raise ValueError(f"weights is {args.weights}; it must be {len(args.models)} numbers above 0.")


def steps_and_weights(args: MergeArguments) -> tuple[list[float], list[float]]:
    """-> t of each step (none but for slerp), and what each model weighs in the end, which sums to 1."""
    if args.method != "slerp":
        weights = args.weights or [1.0] * len(args.models)
        return [], [weight / sum(weights) for weight in weights]
    steps = args.t or [1 / n for n in range(2, len(args.models) + 1)]
    return steps, reduce(lambda weights, t: [weight * (1 - t) for weight in weights] + [t], steps, [1.0])


def fetch(model: str, revision: str | None) -> Path:
    """A folder as it is; of a Hub id the files at its top, without what a training leaves beside them."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} is no folder, and the Hub did not give it: {error}") from error


def open_checkpoint(name: str, folder: Path) -> Checkpoint:
    """Safetensors only; raises FileNotFoundError or ValueError where the folder has none, or is ambiguous."""
    found = [(folder / file).exists() for file in (WEIGHTS, INDEX)]
    if not any(found):
        raise FileNotFoundError(f"{name} has no {WEIGHTS}; save it with save_pretrained first.")
    if all(found):
        raise ValueError(f"{name} has both {WEIGHTS} and {INDEX}; delete the one that is stale.")
    loader = LazyTensorLoader.from_disk(str(folder))
    shapes = {}
    for shard in loader.index.shards:
        if Path(shard.filename).name != shard.filename or not shard.filename.endswith(".safetensors"):
            raise ValueError(f"{name}: {INDEX} names {shard.filename!r}, which is no safetensors file beside it.")
        with safe_open(folder / shard.filename, framework="pt") as file:
            for tensor in sorted(shard.contained_keys):
                shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
    return Checkpoint(name, folder, loader, shapes)


def some(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless transformers finds every weight of the model, its head and its experts."""
    try:  # on the meta device: by name and shape, in no memory
        QueritForSequenceClassification.from_pretrained(checkpoint.folder, device_map="meta")
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint.name} is no whole checkpoint; some tensors of its experts are missing."
        ) from error


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name -> value of all that must be the same in checkpoints that are merged."""
    config = AutoConfig.from_pretrained(checkpoint.folder).to_dict()
    tokenizer = read_tokenizer(checkpoint.folder)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "config.model_type": config["model_type"],  # told first
        **{f"config.{key}": value for key, value in config.items() if key not in FREE_CONFIG},
        # truncation and padding are those of the last call
        **{f"tokenizer.{key}": value for key, value in rules.items() if key not in ("truncation", "padding")},
        "tokenizer's special tokens": tokenizer.special_tokens_map,
        "tokenizer's special ids": tokenizer.all_special_ids,
        "chat template": tokenizer.chat_template,
        **{f"shape of {name}": shape for name, shape in checkpoint.shapes.items()},
    }


def check_alike(models: list[Checkpoint]) -> None:
    """Raise ValueError that says in what the others differ from the first."""
    first = facts_of(models[0])
    for model in models[1:]:
        other = facts_of(model)
        absent = object()
        differing = [key for key in {**first, **other} if first.get(key, absent) != other.get(key, absent)]
        if differing:
            differences = [f"{key} ({short(first.get(key))} against {short(other.get(key))})" for key in differing]
            raise ValueError(
                f"{models[0].name} and {model.name} cannot be merged; they differ in {some(differences)}. "
                "Merge checkpoints that were trained from the same base with the same tokenizer."
            )


def short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors as vectors, summed in float64 by pieces; 0 where one is all zeros."""
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(a.flatten().split(2**20), b.flatten().split(2**20), strict=True):
        x, y = x.double(), y.double()
        sums += torch.stack([x @ y, x @ x, y @ y])
    dot, aa, bb = sums.tolist()
    return dot / math.sqrt(aa * bb) if aa * bb > 0 else 0.0


def merge_in_steps(tensors: list[torch.Tensor], steps: list[Step], dtype: torch.dtype) -> torch.Tensor:
    """Sequential slerp of one tensor of every model; counts into `steps` what fell back to linear."""
    merged = tensors[0].to(dtype)
    for step, tensor in zip(steps, tensors[1:], strict=True):
        other = tensor.to(dtype)
        if torch.equal(merged, other):  # frozen in training: stays as it is, bit for bit
            step.count_identical(merged)
            continue
        if abs(cosine(merged, other)) > LINEAR_COSINE:
            step.linear_tensors += 1
            step.linear_parameters += merged.numel()
        merged = merge_tensors([merged, other], "slerp", base_index=0, parameters={"t": step.t})
    return merged


def merge_at_once(tensors: list[torch.Tensor], method: str, weights: list[float], dtype: torch.dtype) -> torch.Tensor:
    if all_equal(tensors):
        return tensors[0].to(dtype)
    tensors = [tensor.to(dtype) for tensor in tensors]
    if method == "karcher":  # as mergekit registers it, it takes no weights
        return karcher_merge_tensors(tensors, weights)
    return merge_tensors(tensors, method, parameters={"weight": weights})


def all_equal(tensors: list[torch.Tensor]) -> bool:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return all(torch.equal(tensors[0].to(dtype), tensor.to(dtype)) for tensor in tensors[1:])


def tensors_of(models: list[Checkpoint], title: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    for name in tqdm(models[0].shapes, desc=title):
        yield name, [model[name] for model in models]


def merge_weights(
    models: list[Checkpoint], args: MergeArguments, steps: list[Step], weights: list[float], folder: Path
) -> None:
    """Write the merged tensors into `folder`, each in the widest dtype that it has among the inputs."""
    method, dtype = args.method, DTYPES[args.dtype]
    writer = TensorWriter(str(folder), max_shard_size=SHARD_BYTES)
    for name, tensors in tensors_of(models, f"{method}: merging"):
        out_dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        work_dtype = torch.promote_types(dtype, out_dtype)
        if stays(name, args.first_only):
            merged, out_dtype = tensors[0], tensors[0].dtype
            for step in steps:
                step.count_identical(merged)
        elif not out_dtype.is_floating_point:
            if not all_equal(tensors):
                raise ValueError(f"{name} holds whole numbers that differ between the models; it cannot be merged.")
            merged = tensors[0]
            for step in steps:
                step.count_identical(merged)
        elif method == "slerp":
            merged = merge_in_steps(tensors, steps, work_dtype)
        else:
            try:
                merged = merge_at_once(tensors, method, weights, work_dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        writer.save_tensor(name, merged.to(out_dtype))
    writer.finalize()


def stays(tensor: str, first_only: Sequence[str]) -> bool:
    return any(part in tensor for part in first_only)


def check_merged(
    merged: Checkpoint, models: list[Checkpoint], weights: list[float], first_only: Sequence[str] = ()
) -> None:
    """Raise ValueError unless the files of a merge hold all that the models hold, every tensor merged and finite.

    A tensor may equal an input's only where the weighted mean is that input's too, to rounding: all of them are equal,
    the others weigh nothing, or they differ by less than the dtype tells apart.
    """
    expected = models[0].shapes
    if lost := [name for name in expected if name not in merged.shapes]:
        experts = [name for name in lost if ".experts." in name]
        names = f"{len(experts)} tensors of routed experts: {some(experts)}" if experts else some(lost)
        raise ValueError(f"{merged.name} lost {len(lost)} tensors, {names}.")
    if strange := [name for name, shape in merged.shapes.items() if expected.get(name) != shape]:
        raise ValueError(f"{merged.name} has {some(strange)}, which no model has in that shape.")
    for name, (out, *tensors) in tensors_of([merged, *models], "checking"):
        if stays(name, first_only):
            tensors = tensors[:1]
        out_dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        if out.dtype != out_dtype:
            raise ValueError(f"{merged.name} has {name} in {out.dtype}, the models in {out_dtype}.")
        if not out.isfinite().all():
            guilty = [m.name for m, tensor in zip(models, tensors, strict=False) if not tensor.isfinite().all()]
            raise ValueError(f"{name} holds NaN or infinity, in {', '.join(guilty) or 'the merge alone'}.")
        tensors = [tensor.to(out_dtype) for tensor in tensors]
        if all_equal(tensors):
            if not torch.equal(out, tensors[0]):
                raise ValueError(f"{name} is the same in all models, but not in the merge.")
            continue
        for model, tensor in zip(models, tensors, strict=True):
            if torch.equal(out, tensor) and not near_mean(tensor, tensors, weights):
                raise ValueError(f"{name} was not merged: it is still that of {model.name}.")
    check_whole(merged)


def near_mean(tensor: torch.Tensor, tensors: list[torch.Tensor], weights: list[float]) -> bool:
    """Whether the weighted mean of the tensors is this one, to two steps of its dtype."""
    mean = sum(weight * other.float() for weight, other in zip(weights, tensors, strict=True))
    limits = torch.finfo(tensor.dtype)
    return torch.allclose(mean, tensor.float(), rtol=2 * limits.eps, atol=limits.tiny)  # type: ignore[arg-type]


def copy_files(models: list[Checkpoint], folder: Path) -> None:
    """Config, tokenizer, chat template and remote code of the first model.

    Left behind: what a training writes beside them, the card, and the files for sentence-transformers, whose Dense
    module holds a copy of the head; hub_card.build writes those anew.
    """
    first = models[0].folder
    tokenizer = AutoTokenizer.from_pretrained(first)
    names = {*tokenizer.vocab_files_names.values(), "config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
    for file in sorted({first / name for name in names} | set(first.glob("*.py"))):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtypes = {AutoConfig.from_pretrained(model.folder).dtype or torch.float32 for model in models}
    if len(dtypes) > 1:
        config["dtype"] = str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    pipelines = [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
    for reference in [*config.get("auto_map", {}).values(), *pipelines]:
        if not (folder / f"{reference.split('.')[0]}.py").exists():
            raise ValueError(f"{models[0].name}: config.json names the code {reference}, but its file is not there.")


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: file_hash(file) for file in sorted(folder.glob("*.safetensors"))}


def report_of(models: list[Checkpoint], steps: list[Step]) -> dict[str, Any]:
    """Counts of the whole merge and of each step, which are printed too.

    A step's shares are of what differed: a tensor that stood there already was merged in no way at all.
    """
    tensors, parameters = len(models[0].shapes), sum(map(math.prod, models[0].shapes.values()))
    print(f"Merged {', '.join(model.name for model in models)}: {tensors:,} tensors, {parameters:,} parameters")
    reports = []
    for step in steps:
        differing = tensors - step.identical_tensors
        share = step.linear_tensors / max(1, differing)
        of_parameters = step.linear_parameters / max(1, parameters - step.identical_parameters)
        shares = {"linear_share_of_differing_tensors": share, "linear_share_of_differing_parameters": of_parameters}
        reports.append(vars(step) | shares)
        print(
            f"  + {step.model}, t {step.t:.3f}: |cos| > {LINEAR_COSINE}, so linear, for {step.linear_tensors:,} of the "
            f"{differing:,} tensors that differ ({share:.1%}; {of_parameters:.1%} of their parameters); "
            f"{step.identical_tensors:,} identical"
        )
    return {"tensors": tensors, "parameters": parameters, "steps": reports, "mergekit": version("mergekit")}


def main(args: MergeArguments) -> None:
    check_arguments(args)
    ratios, weights = steps_and_weights(args)
    folders = [fetch(model, args.revisions.get(model)) for model in args.models]
    for folder in folders:
        check_weight_files(folder)
    models = [open_checkpoint(name, folder) for name, folder in zip(args.models, folders, strict=True)]
    inputs = [
        {"model": model.name, "revision": args.revisions.get(model.name), "sha256": hashes(model.folder)}
        for model in models
    ]
    wanted: dict[str, Any] = {"method": args.method, "models": inputs, "t": ratios, "weights": weights}
    wanted |= {"dtype": args.dtype, "first_only": args.first_only or None}  # as of older records, which leave it out
    out = Path(args.output_dir)
    if already_made(out, wanted, MERGE_RECORD):
        return
    for model in models:
        check_whole(model)
    check_alike(models)

    with appears_whole(out) as folder:
        folder.mkdir()
        steps = [Step(model, t) for model, t in zip(args.models[1:], ratios, strict=False)]
        merge_weights(models, args, steps, weights, folder)
        copy_files(models, folder)
        check_merged(open_checkpoint("the merge", folder), models, weights, args.first_only)
        this = {**wanted, **report_of(models, steps), "sha256": hashes(folder)}
        write_merges(folder, [*merges_of(*folders), this])


if __name__ == "__main__":
    (arguments,) = TrlParser(MergeArguments).parse_args_and_config()  # type: ignore[arg-type]
    main(arguments)
