"""Turn a dynamically quantised ONNX cross-encoder back into the weights of a BertForSequenceClassification."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import BertConfig

QUANTIZED = "_quantized"  # beside it stand the tensors `_scale` and `_zero_point`


def read_int8_bert(path: Path, heads: int) -> tuple[dict[str, torch.Tensor], BertConfig]:
    """-> (state of a BertForSequenceClassification with one label, its config), in float32.

    A quantised tensor q stands for scale * (q - zero_point). A matrix has lost its name in the graph: it is told by the
    node that multiplies with it, `/bert/encoder/layer.0/attention/self/query/MatMul_quant`, and is stored transposed.
    Nothing in the file says how many attention heads there are.
    """
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def restored(name: str) -> torch.Tensor:
        stem = name.removesuffix(QUANTIZED)
        scale, zero = stored[f"{stem}_scale"].astype(np.float32), stored[f"{stem}_zero_point"].astype(np.float32)
        return torch.from_numpy((stored[name].astype(np.float32) - zero) * scale)

    state = {}
    for name, values in stored.items():
        if name.startswith(("bert.", "classifier.")):
            if name.endswith(QUANTIZED):
                state[name.removesuffix(QUANTIZED)] = restored(name)
            elif f"{name.rsplit('_', 1)[0]}{QUANTIZED}" not in stored and not name.endswith("_zero_point"):
                state[name] = torch.from_numpy(values.astype(np.float32))
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            *module, _ = node.name.strip("/").split("/")
            state[f"{'.'.join(module)}.weight"] = restored(node.input[1]).T.contiguous()
    words = state.get("bert.embeddings.word_embeddings.weight")
    if words is None or "classifier.weight" not in state:
        raise ValueError(f"{path} is no quantised ONNX file of a BertForSequenceClassification.")
    layers = {name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}
    config = BertConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        intermediate_size=state["bert.encoder.layer.0.intermediate.dense.bias"].shape[0],
        max_position_embeddings=state["bert.embeddings.position_embeddings.weight"].shape[0],
        num_labels=1,  # type: ignore[call-arg]
    )
    return state, config
