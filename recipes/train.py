"""Train a Querit reranker on groups of scored candidates: general training and adaptation alike.

    python -m recipes.train --config recipes/querit-nano/1_general.yaml

Every key of the YAML is a field of `ScriptArguments` below or of TRL's `RewardConfig`. A run that was stopped goes on
from its last checkpoint; a finished one is left as it is. Several GPUs:

    accelerate launch -m recipes.train --config ...
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer
from trl import RewardConfig, TrlParser

from hub_card.provenance import merges_of, write_merges
from modeling_querit.modeling_querit import QueritForSequenceClassification
from modeling_querit.prompting_querit import PromptEncoder
from querit.files import content_hash, write_json
from recipes.lib.backbones import from_backbone
from recipes.lib.pieces import hold_english

# What of TRL's config the weights depend on; the rest says how it is logged, stored and computed.
DECIDING = (
    "max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
    "train_sampling_strategy", "bf16", "disable_dropout", "seed",
)  # fmt: skip
LOSSES = ("margin", "kl", "distil")
STATE = "trainer_state.json"  # in every checkpoint, and beside the final weights, which it is written after
WEIGHTS = "model*.safetensors"  # large ones stand in several files


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "A Querit reranker, or a plain backbone to put a head on."})
    train_data: str = field(metadata={"help": "Parquet file of recipes.score: query, documents, labels."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit of a model from the Hub."})
    pooling: str | None = field(default=None, metadata={"help": "Read-out of a new head: last or cls."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager is the fastest on CPUs, sdpa elsewhere."})
    loss: str = field(
        default="margin",
        metadata={"help": "margin (Querit's), kl (ListNet with soft labels) or distil (the teacher's logits)."},
    )
    margin_scale: float = field(default=0.8, metadata={"help": "margin: wanted score gap per gap of the labels."})
    label_temperature: float = field(default=0.15, metadata={"help": "kl: softmax temperature of the labels."})
    logit_temperature: float = field(default=2.0, metadata={"help": "distil: temperature of both softmaxes."})
    mse_weight: float = field(default=0.02, metadata={"help": "distil: weight of the squared error of the logits."})
    states_teacher: str | None = field(
        default=None,
        metadata={"help": "distil: model of the same tokenizer whose states on the English sides are learnt too."},
    )
    states_layers: list[int] = field(default_factory=lambda: [5, 8, 11], metadata={"help": "Layers, from 1, of these."})
    states_weight: float = field(default=1.0, metadata={"help": "Weight of the states' part of the loss."})
    words_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the word embeddings, where it is to be another."}
    )
    vocabulary: str | None = field(
        default=None, metadata={"help": "Folder of recipes.vocabulary; its English pieces' embeddings stay put."}
    )
    freeze: list[str] = field(default_factory=list, metadata={"help": "Parameters with these in their name stay put."})
    max_groups: int | None = field(default=None, metadata={"help": "Use only the first queries of the data."})


def margin_loss(scores: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, scale: float) -> torch.Tensor:
    """Pairwise margin loss of Querit-Reranker (arXiv:2606.19037, publishers' code).

    relu(scale * (y_i - y_j) - (s_i - s_j)), mean over all pairs (i, j) of one query with y_i > y_j.

    Args: scores in [-1, 1], labels in [0, 1] and real (False where a group is padded), each `(queries, documents)`.
    A batch without any such pair gives 0, with a gradient of 0.
    """
    label_gap = labels[:, :, None] - labels[:, None, :]
    score_gap = scores[:, :, None] - scores[:, None, :]
    pairs = (label_gap > 0) & real[:, :, None] & real[:, None, :]
    losses = F.relu(scale * label_gap - score_gap) * pairs
    return losses.sum() / pairs.sum().clamp(min=1)


def kl_loss(logits: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax(labels / temperature) || softmax(logits)) per query, mean over queries (ListNet, Cao et al. 2007)."""
    lowest = torch.finfo(logits.dtype).min
    target = torch.softmax((labels / temperature).masked_fill(~real, lowest), dim=1)
    predicted = torch.log_softmax(logits.masked_fill(~real, lowest), dim=1)
    return F.kl_div(predicted, target, reduction="batchmean")


def distil_loss(
    logits: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor, temperature: float, mse_weight: float
) -> torch.Tensor:
    """KL(softmax(wanted / T) || softmax(logits / T)), mean over queries, + mse_weight * mean squared error.

    The first part (Hinton et al. 2015) moves the order within a query, the second the level that a probability needs.
    Args: `logits` and the teacher's `wanted`, `(queries, documents)`; real is False where a group is padded.
    """
    lowest = torch.finfo(logits.dtype).min
    target, predicted = (x.masked_fill(~real, lowest).div(temperature) for x in (wanted, logits))
    divergence = F.kl_div(predicted.log_softmax(1), target.softmax(1), reduction="batchmean")
    return divergence + mse_weight * F.mse_loss(logits[real], wanted[real])


def states_loss(student: torch.Tensor, teacher: torch.Tensor, matched: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the matched tokens' states, `(pairs, tokens, hidden)` of both sides.

    Half of it is the mean over first tokens, which the score is read off, half that over all others.

    `matched` is `(tokens, 4)`: a pair and a place of the student's, a pair and a place of the teacher's.
    """
    row, place, english_row, english_place = matched.unbind(1)
    apart = 1 - F.cosine_similarity(student[row, place].float(), teacher[english_row, english_place].float())
    return (apart[place == 0].mean() + apart[place > 0].mean()) / 2


def matched_places(ids: list[int], english: list[int]) -> list[tuple[int, int]]:
    """Places of the tokens that two sides of a pair share: the first, and all that both end with.

    The passage of a switched or translated question is mostly the English one, so that its states can be compared one
    by one; where it is not, the first and the last token are left.
    """
    shared = 1
    while shared < min(len(ids), len(english)) and ids[-shared - 1] == english[-shared - 1]:
        shared += 1
    ends = range(-shared, 0)
    return [(0, 0), *((len(ids) + end, len(english) + end) for end in ends if len(ids) + end and len(english) + end)]


class GroupCollator:
    """Groups of candidates -> one padded batch of pairs, and the matrices that tell which pair is whose.

    `labels` and `real` are `(queries, most documents of a query)`; pairs stand query by query. `token_type_ids` are
    there where the groups have them. Where groups have English sides `english` is a batch of these, and `matched` says
    which tokens stand in both: see `states_loss`.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def pad(self, groups: list[dict], prefix: str = "") -> dict[str, torch.Tensor]:
        rows = [torch.tensor(ids) for group in groups for ids in group[f"{prefix}input_ids"]]
        input_ids = torch.full((len(rows), max(map(len, rows))), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if f"{prefix}token_type_ids" in groups[0]:
            types = [torch.tensor(ids) for group in groups for ids in group[f"{prefix}token_type_ids"]]
            batch["token_type_ids"] = torch.zeros_like(input_ids)
            for index, row in enumerate(types):
                batch["token_type_ids"][index, : len(row)] = row
        return batch

    def match(self, groups: list[dict]) -> dict[str, Any]:
        first, english_first, matched = 0, 0, []
        for group in groups:
            for n, (ids, english) in enumerate(zip(group["input_ids"], group["english_input_ids"], strict=False)):
                places = matched_places(ids, english)
                matched += [(first + n, place, english_first + n, other) for place, other in places]
            first, english_first = first + len(group["input_ids"]), english_first + len(group["english_input_ids"])
        if not english_first:
            return {}
        with_sides = [group for group in groups if group["english_input_ids"]]
        return {"english": self.pad(with_sides, "english_"), "matched": torch.tensor(matched)}

    def __call__(self, groups: list[dict]) -> dict[str, Any]:
        batch: dict[str, Any] = self.pad(groups)
        if "english_input_ids" in groups[0]:
            batch |= self.match(groups)
        most = max(len(group["input_ids"]) for group in groups)
        labels = torch.zeros(len(groups), most)
        real = torch.zeros(len(groups), most, dtype=torch.bool)
        for index, group in enumerate(groups):
            labels[index, : len(group["labels"])] = torch.tensor(group["labels"])
            real[index, : len(group["labels"])] = True
        return batch | {"labels": labels, "real": real}


def tokenize_groups(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: str, english: bool = False
) -> Dataset:
    """Groups -> their pairs' token ids, `labels` (the column of that name), and `length`, by which batches are made.

    With `token_type_ids` where the tokenizer's template sets any, and with `english` the same of the English sides
    (`english_input_ids`, empty without one).
    """
    encoder = PromptEncoder(tokenizer, max_length)

    def encode(query: str, documents: list[str], prefix: str = "") -> dict:
        pairs = encoder.encode(query, documents)
        types = [pair.token_type_ids for pair in pairs]
        row = {f"{prefix}input_ids": [pair.input_ids for pair in pairs]}
        return row | ({f"{prefix}token_type_ids": types} if prefix or any(map(any, types)) else {})

    def tokenize(group: dict) -> dict:
        row = encode(group["query"], group["documents"]) | {"labels": group[labels]}
        row["length"] = max(map(len, row["input_ids"]))
        return row | (encode(group["english_query"], group["english_documents"], "english_") if english else {})

    return data.map(tokenize, remove_columns=[name for name in data.column_names if name != "labels"])


class WordsTrainer(Trainer):
    """transformers' trainer, with a learning rate of its own for the word embeddings, and its metrics' means logged."""

    loss_is_scaled_for_ga = False  # a mean over the batch

    def __init__(self, *args, script_args, **kwargs):
        self.script_args = script_args
        self.metrics: dict[str, list[float]] = {}  # since they were last logged
        super().__init__(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        means = {name: sum(values) / len(values) for name, values in self.metrics.items()}
        self.metrics.clear()
        super().log(logs | means, start_time)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is not None or self.script_args.words_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        words = self.model.get_input_embeddings().weight  # type: ignore[union-attr,operator]
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter is not words]
        # No decay: at each step it would shrink the words that the batch does not hold.
        optimizer.add_param_group({"params": [words], "lr": self.script_args.words_learning_rate, "weight_decay": 0.0})
        return optimizer


class GroupTrainer(WordsTrainer):
    """On whole groups: n forward passes give all n (n - 1) / 2 pairs of a query."""

    def __init__(self, *args, states_teacher: torch.nn.Module | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.states_teacher = None if states_teacher is None else states_teacher.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        script, labels, real = self.script_args, inputs.pop("labels"), inputs.pop("real")
        english, matched = inputs.pop("english", None), inputs.pop("matched", None)
        outputs = model(**inputs, output_hidden_states=english is not None)

        def grouped(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(labels).masked_scatter(real, values.squeeze(-1))

        logits, scores = grouped(outputs.logits), grouped(outputs.score)
        if script.loss == "margin":
            loss = margin_loss(scores, labels, real, script.margin_scale)
        elif script.loss == "kl":
            loss = kl_loss(logits, labels, real, script.label_temperature)
        else:
            loss = distil_loss(logits, labels, real, script.logit_temperature, script.mse_weight)
        if english is not None:
            with torch.no_grad():
                wanted = self.states_teacher(**english, output_hidden_states=True).hidden_states
            losses = [states_loss(outputs.hidden_states[n], wanted[n], matched) for n in script.states_layers]
            apart = torch.stack(losses).mean()
            self.metrics.setdefault("states_apart", []).append(apart.item())
            loss = loss + script.states_weight * apart

        with torch.no_grad():
            pairs = (labels[:, :, None] > labels[:, None, :]) & real[:, :, None] & real[:, None, :]
            right = (scores[:, :, None] > scores[:, None, :]) & pairs
            spread = scores[real].std() if real.sum() > 1 else scores.new_zeros(())
        self.metrics.setdefault("pair_accuracy", []).append((right.sum() / pairs.sum().clamp(min=1)).item())
        self.metrics.setdefault("score_spread", []).append(spread.item())
        return (loss, outputs) if return_outputs else loss


def load_model(script: ScriptArguments, dtype: torch.dtype) -> QueritForSequenceClassification:
    options: dict[str, Any] = {
        "revision": script.model_revision or "main",
        "attn_implementation": script.attn_implementation,
        "dtype": dtype,
    }
    try:
        return QueritForSequenceClassification.from_pretrained(script.model_name_or_path, **options)
    except ValueError as error:
        if "is no Querit reranker" not in str(error):
            raise
    return from_backbone(script.model_name_or_path, pooling=script.pooling, **options)


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last in it."""
    folders = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(folders):
        try:
            json.loads((folder / STATE).read_bytes())
            return str(folder)
        except (FileNotFoundError, json.JSONDecodeError):
            print(f"{folder} is not whole: the run was stopped while it was written")
    return None


def is_finished(out: Path) -> bool:
    """Whether a training came to its end here, its weights are there, and no other one has begun since."""
    try:
        state = json.loads((out / STATE).read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return state["global_step"] >= state["max_steps"] and any(out.glob(WEIGHTS))


def check_settings(script, args: RewardConfig) -> None:
    """Note what this run depends on in `training.json`, and the merges that its model came by.

    A run of other settings is neither taken up nor overwritten.
    """
    out = Path(str(args.output_dir))
    settings: dict[str, Any] = asdict(script) | {name: getattr(args, name) for name in DECIDING}
    for key in ("model_name_or_path", "train_data", "states_teacher"):
        if settings.get(key) and Path(settings[key]).exists():
            settings[key] = content_hash(settings[key])  # a folder may move
    settings = json.loads(json.dumps(settings))
    noted, begun = out / "training.json", any(out.glob(WEIGHTS)) or any(out.glob("checkpoint-*"))
    if begun:
        before = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
        if changed := [key for key in settings if before.get(key) != settings[key]]:
            raise FileExistsError(
                f"{out} holds a run of other settings ({', '.join(changed[:4])} changed). Move it away, or name "
                "another output_dir."
            )
    elif args.process_index == 0:
        write_json(noted, settings)
        write_merges(out, merges_of(script.model_name_or_path))


def check(script: ScriptArguments, args: RewardConfig) -> None:
    if script.loss not in LOSSES:
        raise ValueError(f"loss is {script.loss!r}; it must be margin, kl or distil.")
    if script.states_teacher is not None and script.loss != "distil":
        raise ValueError("states_teacher goes with loss: distil.")
    if math.isclose(args.learning_rate, 0):
        raise ValueError("learning_rate is 0: nothing would be learnt.")
    if args.n_gpu > 1:
        raise ValueError("Several GPUs are visible: start with `accelerate launch -m recipes.train`, or show one only.")


def prepare_model(script: ScriptArguments, args: RewardConfig) -> QueritForSequenceClassification:
    torch.manual_seed(args.seed)  # a new head
    model = load_model(script, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in script.freeze))
    if script.words_learning_rate is not None and not model.get_input_embeddings().weight.requires_grad:
        raise ValueError("words_learning_rate is given, but freeze holds the word embeddings: leave one of them out.")
    if script.vocabulary is not None:
        if script.words_learning_rate is None:
            raise ValueError("vocabulary is given: give words_learning_rate too, whose words have no weight decay.")
        hold_english(model.get_input_embeddings().weight, script.vocabulary)  # type: ignore[arg-type]
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model


def read_groups(script: ScriptArguments, args: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    data = load_dataset("parquet", data_files=script.train_data, split="train")
    if script.max_groups:
        data = data.select(range(min(script.max_groups, len(data))))
    labels = "scores" if script.loss == "distil" else "labels"
    if labels not in data.column_names:
        raise ValueError(f"{script.train_data} has no column `{labels}`, which loss: {script.loss} learns from.")
    english = script.states_teacher is not None
    if english and "english_query" not in data.column_names:
        raise ValueError(f"{script.train_data} has no English sides for states_teacher; recipes.crosslingual's has.")
    with args.main_process_first():
        return tokenize_groups(data, tokenizer, args.max_length or tokenizer.model_max_length, labels, english)


def load_states_teacher(script: ScriptArguments, args: RewardConfig) -> QueritForSequenceClassification | None:
    if script.states_teacher is None:
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    options: dict[str, Any] = {"attn_implementation": script.attn_implementation, "dtype": dtype}
    teacher = QueritForSequenceClassification.from_pretrained(script.states_teacher, **options).eval()
    layers = teacher.config.num_hidden_layers
    if beyond := [layer for layer in script.states_layers if not 1 <= layer <= layers]:
        raise ValueError(f"states_layers names layer {beyond[0]}, but {script.states_teacher} has {layers}.")
    return teacher


def main(script: ScriptArguments, args: RewardConfig) -> None:
    check(script, args)
    check_settings(script, args)
    out = Path(str(args.output_dir))
    if is_finished(out):  # its checkpoints may be gone: without them it would be trained again, over itself
        if args.process_index == 0:
            print(f"{out} is there already; delete it to make it again.")
        return
    (out / STATE).unlink(missing_ok=True)  # of an end whose weights are gone: beside half of new ones it would lie
    model = prepare_model(script, args)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path, revision=script.model_revision or "main")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    args.remove_unused_columns = False  # the collator takes them all
    args.include_num_input_tokens_seen = "non_padding"
    trainer = GroupTrainer(
        model=model,
        args=args,
        script_args=script,
        states_teacher=load_states_teacher(script, args),
        train_dataset=read_groups(script, args, tokenizer),
        processing_class=tokenizer,
        data_collator=GroupCollator(tokenizer.pad_token_id or 0),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(str(out)))
    trainer.save_model(str(out))
    trainer.save_state()
    trainer.accelerator.end_training()  # else a process of several may abort as it ends, its threads still running


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, RewardConfig)).parse_args_and_config())  # type: ignore[arg-type]
