"""A causal Querit folder -> a transformers ...ForSequenceClassification folder with one label, as vLLM serves it.

The head's two rows become one, `score.weight = w1 - w0` and `score.bias = b1 - b0`, in float32; every other weight
stays as it is. vLLM's adapter of a causal model to a classifier (vllm/model_executor/models/adapters.py, 0.32)
computes the score in float32, loads `score.bias` where a checkpoint has one, and applies a sigmoid to a single label:
the model's probability. transformers' class has no bias; there `score_bias` of config.json is to be added to the logit.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging

from hub_card.convert import INDEX, MODEL_TYPES, link_or_copy, read_headers, read_index, weight_files, write_json
from hub_card.export import (
    config_for_engines,
    copy_tokenizer_and_licence,
    encode_probes,
    largest_difference,
    load_for_export,
    probe_logits,
    write_record,
)
from modeling_querit.prompting_querit import EncodedPair

# lm_head: what a checkpoint may still have of the language model that it was; no classifier has a place for it.
LEFT_OUT = ("head.weight", "head.bias", "lm_head.weight")
TEMPLATE = "chat_template.jinja"
KEEPS = {
    "order": "the same",
    "probability": "the same, in [0, 1]: what vLLM answers, sigmoid(logit + score_bias) in transformers",
    "score": "Querit's score in [-1, 1] is 2 * probability - 1",
    "without score_bias": "transformers' logits are all lower by score_bias: the order is kept, the probability is not",
}
# What vLLM reads of an architecture's router and transformers does not write, since its class has no other: without it
# vLLM finds no place for the router's bias, and would choose experts by softmax.
ROUTERS = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
# vLLM 0.32's own rotary kernel for CPUs turns the first head alone where the heads of a query are an axis of their own,
# as here and not in qwen3: probabilities of small models were off by up to 0.2.
ON_CPU = {
    "deepseek_v3": """
**On a CPU** add `--compilation-config '{"custom_ops": ["all", "-rotary_embedding"]}'`: vLLM's kernel for rotary
positions there turns only the first head, and the scores would be wrong. In float32 a CPU with AMX needs
`--attention-backend CPU_MLA`, too.
""",
}
# What README.md says of runs is true of each of MODEL_TYPES: tests/integrations/test_vllm.py runs them.
README = """# {name} for vLLM

`{architecture}` with one label, exported from `{name}` by `querit export --to vllm`.

```bash
vllm serve . --runner pooling --dtype {dtype} --max-model-len {max_length} --chat-template {template}
curl localhost:8000/score -H 'Content-Type: application/json' \\
  -d '{{"queries": "Why does the sea rise?", "documents": ["The Moon pulls on it.", "Salt."]}}'
```

Offline it is
`LLM(model=".", runner="pooling", dtype="{dtype}").score(query, documents, chat_template=open("{template}").read())`.
**Give the chat template**: for scores vLLM takes none from the folder by itself, and without one it glues query and
document together, with no prompt. `export.json` holds probe pairs with the model's probabilities: send one to see that
all is well. As it starts vLLM warns "Chat template warmup failed": it tries a chat, whose role `user` the template
refuses, because it would have to drop the text. Pairs are not concerned.

| | kept |
|---|---|
| order | the same |
| probability | the same: the `score` that vLLM answers, in [0, 1] (weights in `{dtype}`, the head in float32) |
| Querit's score in [-1, 1] | 2 * probability - 1 |
| instruction | send it as `instruction` |
| pairs of more than {max_length} tokens | refused: set `max_tokens_per_doc` |
| a text that spells a control token, like `[CLS]` | becomes one; Querit reads it as plain text |

**Never set `truncate_prompt_tokens`**: it cuts off the prompt's end, where the score is read.

Small models of this architecture, exported alike, were run with vLLM 0.32 on a CPU in float32: `/score` and `/rerank`
are equal to the pipeline to 1e-5 on 214 pairs. This export was not run.
{on_cpu}
The bias of the head, {bias:+.6g}, is `score.bias` in the weights, which vLLM adds. transformers' class has no bias,
leaves `score.bias` out with a warning, and its logits keep the order but are too {direction} by it; add `score_bias` of
config.json:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".", dtype=torch.float32)
messages = [
    {{"role": "query", "content": "Why does the sea rise?"}},
    {{"role": "document", "content": "The Moon pulls on it."}},
]
prompt = tokenizer.apply_chat_template(messages, tokenize=False)
logit = model(**tokenizer(prompt, return_tensors="pt")).logits[0, 0] + model.config.score_bias
probability = torch.sigmoid(logit).item()
print(probability)
```
"""


def write_vllm(source: Path, config: dict, folder: Path) -> None:
    """Fill `folder`. The model is loaded in float32, twice, one after the other. Raises ValueError as `export` says."""
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{source} is a {config.get('model_type')}; the export to vLLM is of the causal members, "
            f"{' and '.join(MODEL_TYPES)}, read out at the last token. Use --to onnx for this one."
        )
    ranker = load_for_export(source)
    model: Any = ranker.model
    tokenizer = ranker.tokenizer
    architecture: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model.config)]
    if not issubclass(architecture, GenericForSequenceClassification) or model.pooling != "last":
        raise ValueError(
            f"{source} reads out the {model.pooling} token; {architecture.__name__} reads the last one. Only models "
            'with classifier_pooling "last" have this export.'
        )
    if not tokenizer.chat_template or tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {source} has no chat template or no pad token, which vLLM and transformers need. Use "
            "the release's own tokenizer files."
        )
    weight = model.head.weight.detach().float().diff(dim=0)
    bias = model.head.bias.detach().float().diff(dim=0)
    texts, pairs = encode_probes(ranker)
    expected = probe_logits(model, pairs, tokenizer.pad_token_id)
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    del ranker, model  # the exported one comes in its place

    write_weights(source, folder, {"score.weight": weight.contiguous(), "score.bias": bias})
    changed = {"pad_token_id": tokenizer.pad_token_id, "score_bias": bias.item()}
    changed |= ROUTERS.get(config["model_type"], {})
    write_json(folder / "config.json", {**config_for_engines(config, architecture.__name__), **changed})
    copy_tokenizer_and_licence(source, folder)
    (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")

    check_prompts(folder, texts, pairs)
    found = score_exported(folder, architecture, pairs, tokenizer.pad_token_id) + bias.item()
    record = {
        "to": "vllm",
        "architecture": architecture.__name__,
        "score_bias": bias.item(),
        "keeps": KEEPS,
        "checked": {
            "with": f"transformers {version('transformers')}, float32",
            "largest_difference_of_a_logit": largest_difference(found.numpy(), expected),
        },
    }
    readme = README.format(
        name=source.resolve().name,
        architecture=architecture.__name__,
        template=TEMPLATE,
        bias=bias.item(),
        direction="low" if bias.item() > 0 else "high",
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        max_length=int(min(limit for limit in limits if limit)),
        on_cpu=ON_CPU.get(config["model_type"], ""),
    )
    write_record(folder, record, texts, expected, readme)


def write_weights(source: Path, folder: Path, score: dict[str, torch.Tensor]) -> None:
    """The source's files with `score` in place of the head; those without the head are linked, or copied."""
    files = weight_files(source)
    _, places = read_headers(files)
    changed = {places[key] for key in LEFT_OUT if key in places}
    size_change = sum(value.nbytes for value in score.values())
    for file in files:
        if file.name == INDEX:
            continue
        if file not in changed:
            link_or_copy(file, folder / file.name)
            continue
        tensors = load_file(file)
        size_change -= sum(tensors.pop(key).nbytes for key in LEFT_OUT if key in tensors)
        if file == places["head.weight"]:
            tensors.update(score)
        save_file(tensors, folder / file.name, {"format": "pt"})
    if files[0].name == INDEX:
        weight_map = {key: file for key, file in read_index(files[0]).items() if key not in LEFT_OUT}
        weight_map.update(dict.fromkeys(score, places["head.weight"].name))
        metadata = json.loads(files[0].read_bytes()).get("metadata") or {}
        if "total_size" in metadata:
            metadata["total_size"] += size_change
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def check_prompts(folder: Path, texts: list[tuple[str, str]], pairs: list[EncodedPair]) -> None:
    """Renders and tokenises the probes as vLLM's score API does; the ids must be the model's own."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for (query, document), pair in zip(texts, pairs, strict=True):
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False)
        if not pair.truncated and tokenizer(prompt)["input_ids"] != pair.input_ids:
            raise ValueError(
                f"vLLM would tokenise the prompt {prompt!r} otherwise than Querit does: does the tokenizer add tokens "
                "of its own, as a BOS? Use the release's own tokenizer files."
            )


def score_exported(
    folder: Path, architecture: type[torch.nn.Module], pairs: list[EncodedPair], pad_token_id: int
) -> torch.Tensor:
    """Logits by transformers' own class, float32, `(pairs,)`, in padded batches."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report score.bias, which it has no place for
    try:
        options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    missing, unexpected = info["missing_keys"], set(info["unexpected_keys"]) - {"score.bias"}
    if type(model) is not architecture or missing or unexpected or info["mismatched_keys"]:
        raise ValueError(
            f"transformers loads the export as {type(model).__name__}, with {sorted(missing)} missing and "
            f"{sorted(unexpected)} left over. Nothing was written; please report it."
        )
    logits = []
    with torch.inference_mode():
        for start in range(0, len(pairs), 6):
            rows = [torch.tensor(pair.input_ids) for pair in pairs[start : start + 6]]
            input_ids = pad_sequence(rows, True, pad_token_id)
            mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0)
            logits.append(model(input_ids=input_ids, attention_mask=mask).logits[:, 0].float())
    return torch.cat(logits)
