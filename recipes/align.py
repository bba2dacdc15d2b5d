"""Teach a transplanted vocabulary: sentences in other languages come to mean what their English sides do.

    python -m recipes.align --config recipes/querit-nano/1_align.yaml

After recipes.base only English is read as the body was trained to read it. Here two sentences stand as query and
document, each in any language, and the lowest layers' hidden states of the student are brought to those that the frozen
model, the teacher, has for the English sides (as Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings
Multilingual", but piece by piece). Word for word the two sides do not match, so each piece looks for its counterparts
itself: see `alignment_loss`. English pieces' embeddings stay put: the teacher and its head know them.

Only the lowest layers are computed, which is where words get their meaning; the others are put back unchanged. A run
that was stopped goes on from its last checkpoint, and draws the same sentences.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel
from trl import RewardConfig, TrlParser

from recipes.lib.parallel import pairs_with_english, read_translations
from recipes.lib.pieces import hold_english
from recipes.train import WordsTrainer, check_settings, is_finished, last_whole_checkpoint

Pair = tuple[list[int], list[int]]  # ids of a query's and a document's side, special tokens included


@dataclass
class AlignArguments:
    model_name_or_path: str = field(metadata={"help": "Model of recipes.base: the student's start, and the teacher."})
    vocabulary: str = field(metadata={"help": "Folder of recipes.vocabulary, which tells the English pieces."})
    languages: dict[str, float] = field(metadata={"help": "Language -> how often it is drawn, beside the others."})
    parallel: list[str] = field(metadata={"help": "Files of parallel text; see recipes.lib.parallel."})
    aligned: dict[str, dict[str, str]] = field(
        default_factory=dict, metadata={"help": "Name -> {language: BEIR folder} with equal ids for equal documents."}
    )
    words_learning_rate: float | None = field(default=1.2e-3, metadata={"help": "Of the word embeddings."})
    layers: int = field(default=5, metadata={"help": "The lowest layers, which are computed and trained."})
    layer_weights: dict[int, float] = field(
        default_factory=lambda: {2: 0.5, 5: 1.0}, metadata={"help": "Layer, from 1, of matched states -> weight."}
    )
    most_pairs: int = field(default=56_000, metadata={"help": "Pairs of sentences read per language."})
    max_characters: int = field(default=260, metadata={"help": "Longest sentence in characters."})
    max_tokens: int = field(default=60, metadata={"help": "Longest sentence in pieces."})
    same_language: float = field(default=0.5, metadata={"help": "Share of pairs with both sides in one language."})
    english_sides: float = field(default=0.3, metadata={"help": "Share of pairs of which one side is English."})
    temperature: float = field(default=0.05, metadata={"help": "Of the softmax over a piece's counterparts."})
    foreign_weight: float = field(default=1.2, metadata={"help": "Weight of the student's pieces finding theirs."})
    english_weight: float = field(default=0.8, metadata={"help": "Weight of the teacher's pieces finding theirs."})


class SentencePairs(Dataset):
    """Pairs of sentences with their English sides, drawn from `{language: [(ids, English ids)]}`.

    Item n depends on n and the seed alone, so that a resumed run goes on with what it had not seen. The pairs of a step
    stand by length: what is computed together is padded little.
    """

    def __init__(self, sentences: dict[str, list[Pair]], steps: int, step_size: int, seed: int, args: AlignArguments):
        self.sentences, self.steps, self.step_size, self.seed, self.args = sentences, steps, step_size, seed, args
        self.languages = [language for language in args.languages if sentences[language]]
        self.weights = [args.languages[language] for language in self.languages]
        self.step = lru_cache(maxsize=2)(self.draw_step)

    def __len__(self) -> int:
        return self.steps * self.step_size

    def __getitem__(self, index: int) -> dict[str, Pair]:
        return self.step(index // self.step_size)[index % self.step_size]

    def draw_step(self, step: int) -> list[dict[str, Pair]]:
        rng = random.Random(f"{self.seed} {step}")
        return sorted((self.draw(rng) for _ in range(self.step_size)), key=lambda row: sum(map(len, row["foreign"])))

    def draw(self, rng: random.Random) -> dict[str, Pair]:
        first, second = rng.choices(self.languages, self.weights, k=2)
        if rng.random() < self.args.same_language:
            second = first
        (query, english_query), (document, english_document) = (
            rng.choice(self.sentences[language]) for language in (first, second)
        )
        english = rng.random()
        if english < self.args.english_sides / 2:
            document = english_document
        elif english < self.args.english_sides:
            query = english_query
        return {"foreign": (query, document), "english": (english_query, english_document)}


class PairCollator:
    """`[CLS] query [SEP] document [SEP]` of both sides, each `(pairs, tokens)`; `words` leaves special tokens out."""

    def __init__(self, tokenizer):
        self.cls, self.sep, self.pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id

    def __call__(self, rows: list[dict[str, Pair]]) -> dict[str, dict[str, torch.Tensor]]:
        return {side: self.batch([row[side] for row in rows]) for side in ("foreign", "english")}

    def batch(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        width = max(len(query) + len(document) for query, document in pairs) + 3
        input_ids = torch.full((len(pairs), width), self.pad)
        mask, types, words = (torch.zeros_like(input_ids) for _ in range(3))
        for row, (query, document) in enumerate(pairs):
            ids = [self.cls, *query, self.sep, *document, self.sep]
            second = len(query) + 2
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            types[row, second : len(ids)] = 1
            words[row, 1 : second - 1] = 1
            words[row, second : len(ids) - 1] = 1
        return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types, "words": words.bool()}


def alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, foreign: dict[str, torch.Tensor], english: dict[str, torch.Tensor],
    args: AlignArguments,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """How far a layer's states are from the teacher's, and the cosines that it is made of, as scalars.

    Of each piece the cosines with the other side's pieces in the same segment are averaged with weights
    softmax(cosine / temperature), a soft form of BERTScore's maximum (Zhang et al. 2020): `foreign` over the student's
    pieces, `english` over the teacher's. `pooled` is the cosine of both segments' mean states, `cls` that of the first
    token's.

    Args: hidden states `(pairs, tokens, hidden)` of both sides, whose batches are those of `PairCollator`.
    """
    student, teacher = (F.normalize(states.float(), dim=-1) for states in (student, teacher))
    cosines = student @ teacher.transpose(1, 2)
    same_segment = foreign["token_type_ids"][:, :, None] == english["token_type_ids"][:, None, :]
    may = foreign["words"][:, :, None] & english["words"][:, None, :] & same_segment
    weights = cosines.detach().masked_fill(~may, -2.0) / args.temperature
    found = {
        "foreign": (weights.softmax(2) * cosines).sum(2)[foreign["words"]].mean(),
        "english": (weights.softmax(1) * cosines).sum(1)[english["words"]].mean(),
    }

    def pooled(states: torch.Tensor, batch: dict[str, torch.Tensor], segment: int) -> torch.Tensor:
        inside = batch["words"] & (batch["token_type_ids"] == segment)
        return (states * inside[..., None]).sum(1)

    segments = [F.cosine_similarity(pooled(student, foreign, n), pooled(teacher, english, n)) for n in (0, 1)]
    found["pooled"] = torch.stack(segments).mean()
    found["cls"] = (student[:, 0] * teacher[:, 0]).sum(-1).mean()
    scale = {"foreign": args.foreign_weight, "english": args.english_weight, "pooled": 1.0, "cls": 1.0}
    return found | {"loss": torch.stack([weight * (1 - found[name]) for name, weight in scale.items()]).sum()}


class AlignTrainer(WordsTrainer):
    def __init__(self, *args, teacher: BertModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device)  # type: ignore[arg-type]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        foreign, english = inputs["foreign"], inputs["english"]
        with torch.no_grad():
            wanted = states_of(self.teacher, english)
        states, loss = states_of(model, foreign), torch.zeros((), device=self.args.device)
        for layer, weight in self.script_args.layer_weights.items():
            found = alignment_loss(states[layer], wanted[layer], foreign, english, self.script_args)
            loss = loss + weight * found.pop("loss")
        for name, value in found.items():  # of the last layer named
            self.metrics.setdefault(name, []).append(value.item())
        return (loss, None) if return_outputs else loss


def states_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The embeddings, then each layer's states."""
    inputs = {name: values for name, values in batch.items() if name != "words"}
    return model(**inputs, output_hidden_states=True).hidden_states


def read_sentences(tokenizer: Tokenizer, args: AlignArguments) -> dict[str, list[Pair]]:
    translations = read_translations(args.parallel, args.aligned)
    pairs = pairs_with_english(translations, list(args.languages), args.max_characters)
    sentences = {}
    for language, rows in pairs.items():
        random.Random(0).shuffle(rows)
        sides = [
            [encoding.ids for encoding in tokenizer.encode_batch(list(side), add_special_tokens=False)]
            for side in zip(*rows[: args.most_pairs], strict=True)
        ]
        fits = range(3, args.max_tokens + 1)  # one or two pieces are a heading, and say little
        sentences[language] = [pair for pair in zip(*sides, strict=True) if all(len(side) in fits for side in pair)]
    if not any(sentences.values()):
        raise ValueError("No pair of sentences with English in `parallel` and `aligned`, or none of 3 pieces or more.")
    return sentences


def load_lower(args: AlignArguments, dtype: torch.dtype) -> BertModel:
    options: dict[str, Any] = {"num_hidden_layers": args.layers, "add_pooling_layer": False, "dtype": dtype}
    return BertModel.from_pretrained(args.model_name_or_path, **options)


def prepare_student(args: AlignArguments) -> BertModel:
    student = load_lower(args, torch.float32)
    for name, parameter in student.named_parameters():
        # Positions and segments are the same in every language.
        parameter.requires_grad_(not any(part in name for part in ("position_embeddings", "token_type_embeddings")))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    hold_english(student.get_input_embeddings().weight, args.vocabulary)
    return student


def main(script: AlignArguments, args: RewardConfig) -> None:
    if args.max_steps < 1:
        raise ValueError("Give max_steps: sentences are drawn without end.")
    if beyond := [layer for layer in script.layer_weights if not 1 <= layer <= script.layers]:
        raise ValueError(f"layer_weights names layer {beyond[0]}, but layers is {script.layers}.")
    check_settings(script, args)
    out = Path(str(args.output_dir))
    if is_finished(out):
        print(f"{out} is there already; delete it to make it again.")
        return
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    sentences = read_sentences(tokenizer.backend_tokenizer, script)
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.remove_unused_columns = False
    args.train_sampling_strategy = "sequential"  # their order is drawn already
    trainer = AlignTrainer(
        model=prepare_student(script),
        args=args,
        script_args=script,
        teacher=load_lower(script, torch.bfloat16 if args.bf16 else torch.float32).eval(),
        train_dataset=SentencePairs(sentences, args.max_steps, step_size, args.seed, script),
        data_collator=PairCollator(tokenizer),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(str(out)))
    whole = BertForSequenceClassification.from_pretrained(script.model_name_or_path)
    kept = whole.bert.load_state_dict(trainer.model.state_dict(), strict=False)  # type: ignore[union-attr]
    assert not kept.unexpected_keys
    if trainer.is_world_process_zero():
        whole.save_pretrained(out)
        tokenizer.save_pretrained(out)
    trainer.save_state()
    trainer.accelerator.end_training()  # as in recipes.train


if __name__ == "__main__":
    main(*TrlParser((AlignArguments, RewardConfig)).parse_args_and_config())  # type: ignore[arg-type]
