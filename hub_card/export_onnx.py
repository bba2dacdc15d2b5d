"""A `bert` Querit folder -> onnx/model.onnx (float32) and onnx/model_int8.onnx, with tokenizer and config.

Both take `input_ids`, `attention_mask` and `token_type_ids`, int64 of any `(batch_size, sequence_length)`, and give
`logits`, float32 `(batch_size, 1)`: the log-odds of relevance, head included. File names and config.json are those that
transformers.js and optimum look for.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxscript  # noqa: F401 - torch's exporter needs it: better told before the work than after
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from hub_card.convert import write_json
from hub_card.export import (
    config_for_engines,
    copy_tokenizer_and_licence,
    encode_probes,
    largest_difference,
    load_for_export,
    probe_logits,
    write_record,
)
from hub_card.exported_onnx import INPUTS, OnnxReranker
from modeling_querit.modeling_querit import POOLER_MODEL_TYPE, QueritForSequenceClassification
from modeling_querit.prompting_querit import EncodedPair

FLOAT32, INT8 = "onnx/model.onnx", "onnx/model_int8.onnx"
# Least rank correlation of int8's scores with the model's over the probes. Seen: 0.98 and more.
LEAST_CORRELATION = 0.9
README = """# {name} for ONNX Runtime

Exported from `{name}` by `querit export --to onnx`. Inputs `input_ids`, `attention_mask` and `token_type_ids`,
int64 of any `(batch, length)`; output `logits`, float32 `(batch, 1)`, the log-odds of relevance. The probability is
sigmoid(logit), Querit's score in [-1, 1] is tanh(logit / 2).

| file | MB | order | score and probability |
|---|---|---|---|
| `{float32}` | {float32_mb:.0f} | the same | the same to rounding |
| `{int8}` | {int8_mb:.0f} | near: judge it on queries of your own | near |

Over {probes} probe pairs, a logit of float32 moved by {difference:.1g} at most; int8's rank correlation with the model
is {correlation:.3f}, and a probability moved by {moved:.3f} at most. int8 has the layers' weights per channel and the
embeddings per table; the head and the products that narrow the feed-forward part stay float32. Weights that are
multiplied use 7 of the 8 bits: on processors without VNNI (AVX2, early AVX-512) products of 8 bits saturate.
Activations are quantised as they come, over all of a batch, so that a score depends a little on what stands beside the
pair.

`querit rank QUERY FILE --model {int8}` runs either file with Querit's own prompts, cuts and batches. Without torch and
transformers:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_length})
tokenizer.enable_padding(pad_id={pad_id}, pad_token="{pad_token}")
session = onnxruntime.InferenceSession("{float32}")

query = "Why does the sea rise?"
documents = ["The Moon pulls on it.", "Salt."]
batch = tokenizer.encode_batch([(query, document) for document in documents])
inputs = {{
    "input_ids": np.array([encoded.ids for encoded in batch]),
    "attention_mask": np.array([encoded.attention_mask for encoded in batch]),
    "token_type_ids": np.array([encoded.type_ids for encoded in batch]),
}}
logits = session.run(["logits"], inputs)[0][:, 0]
probabilities = 1 / (1 + np.exp(-logits))
print(probabilities)
```

Two things differ from Querit there: a text that spells a control token, like `[SEP]`, becomes one, and where a pair is
too long the cut is the tokenizer's. `export.json` holds probe pairs with the model's probabilities.
"""


class Logits(torch.nn.Module):
    """The model with `logits` as its only output."""

    def __init__(self, model: QueritForSequenceClassification):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits


def write_onnx(source: Path, config: dict, folder: Path) -> None:
    """Fill `folder`. Raises ValueError as `export` says."""
    ranker = load_for_export(source)
    model: Any = ranker.model
    tokenizer = ranker.tokenizer
    if model.config.model_type != POOLER_MODEL_TYPE:
        kind = "causal " if model.is_causal else ""
        raise ValueError(
            f"{source} is a {kind}{config.get('model_type')}; the export to ONNX is of members like Nano (bert). Use "
            "--to vllm for a causal one."
        )
    texts, pairs = encode_probes(ranker)
    expected = probe_logits(model, pairs, tokenizer.pad_token_id)
    check_pair_template(source, texts, pairs)

    classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model.config)]
    write_json(folder / "config.json", {**config_for_engines(config, classifier.__name__), "dtype": "float32"})
    copy_tokenizer_and_licence(source, folder)
    (folder / "onnx").mkdir()
    with quiet():
        write_float32(model, folder / FLOAT32)
        write_int8(folder / FLOAT32, folder / INT8)

    float32, int8 = (
        probe_logits(OnnxReranker(folder / name), pairs, tokenizer.pad_token_id) for name in (FLOAT32, INT8)
    )
    difference = largest_difference(float32, expected)
    correlation = rank_correlation(int8, expected)
    if not correlation >= LEAST_CORRELATION:
        raise ValueError(
            f"int8 ranks the probe pairs otherwise than the model (rank correlation {correlation:.2f}). Nothing was "
            "written: this model does not stand 8 bits; please report it."
        )
    moved = float(np.abs(1 / (1 + np.exp(-int8)) - 1 / (1 + np.exp(-expected))).max())
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    record = {
        "to": "onnx",
        "keeps": {
            FLOAT32: {"order": "the same", "score": "the same", "probability": "the same"},
            INT8: {"order": "nearly", "score": "near", "probability": "near"},
        },
        "checked": {
            "with": f"onnxruntime {version('onnxruntime')}",
            FLOAT32: {"largest_difference_of_a_logit": difference},
            INT8: {"rank_correlation": round(correlation, 4), "largest_difference_of_a_probability": round(moved, 4)},
        },
    }
    readme = README.format(
        name=source.resolve().name,
        float32=FLOAT32,
        int8=INT8,
        float32_mb=(folder / FLOAT32).stat().st_size / 1e6,
        int8_mb=(folder / INT8).stat().st_size / 1e6,
        probes=len(pairs),
        difference=difference,
        correlation=correlation,
        moved=moved,
        max_length=int(min(limit for limit in limits if limit)),
        pad_id=tokenizer.pad_token_id or 0,
        pad_token=tokenizer.pad_token or "<pad>",
    )
    write_record(folder, record, texts, expected, readme)


def write_float32(model: QueritForSequenceClassification, file: Path) -> None:
    input_ids = torch.ones(2, 9, dtype=torch.long)
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    axes = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length")}
    torch.onnx.export(
        Logits(model).eval(),
        (input_ids, mask, torch.zeros_like(input_ids)),
        file,
        input_names=INPUTS,
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(INPUTS, axes),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    exported = onnx.load(file)
    for part in (*exported.graph.node, *exported.graph.value_info, exported.graph):
        del part.metadata_props[:]  # stack traces, with paths of the machine that exported
    onnx.save(exported, file)


def write_int8(float32: Path, file: Path) -> None:
    """Integer products and embeddings, but for the head and the products that narrow the feed-forward part.

    In float32 the head's near-equal scores do not tie. The input of the narrowing products has few and far outliers:
    with them in 8 bits, Nano's logits are off by 0.07 on average instead of 0.03, at 1.3 times the speed.

    Of the products' weights 7 bits are used. Where there is no VNNI, ONNX Runtime multiplies by VPMADDUBSW, which adds
    two products of an activation (0 to 255) and a weight in 16 bits: with weights in [-128, 127] it saturates, and
    scores were off by half their range. Its documentation names `reduce_range` for such processors:
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    graph = onnx.load(float32).graph
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    head = [node.name for node in graph.node if node.op_type == "Gemm"]
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in shapes]
    narrowing = [node.name for node in products if shapes[node.input[1]][0] > shapes[node.input[1]][1]]
    excluded = [*narrowing, *head, *(f"{name}_MatMul" for name in head)]  # once quantised, a Gemm is a MatMul too
    quantize_dynamic(
        float32,
        file,
        op_types_to_quantize=["MatMul", "Gather"],
        per_channel=True,  # per tensor, they are off by twice as much again
        weight_type=QuantType.QInt8,
        reduce_range=True,  # of products' weights only: embeddings, which are looked up, keep all 8 bits
        nodes_to_exclude=excluded,
    )


def check_pair_template(source: Path, texts: list[tuple[str, str]], pairs: list[EncodedPair]) -> None:
    """The tokenizer by itself, as others run it, must give the ids of the probes."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    for (query, document), pair in zip(texts, pairs, strict=True):
        if not pair.truncated and tokenizer.encode(query, document).ids != pair.input_ids:
            raise ValueError(
                f"tokenizer.json of {source} encodes a pair otherwise than Querit does: it needs a pair template of "
                "its own, and no chat template. Use the release's own tokenizer files."
            )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of numbers without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    matrix: np.ndarray = np.corrcoef(np.stack(ranks))  # type: ignore[assignment]
    return float(matrix[0, 1])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's remarks on themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
