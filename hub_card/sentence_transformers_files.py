"""With these files sentence-transformers' `CrossEncoder(folder)` scores as the pipeline does, without remote code."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

POOLING_MODES = {"last": "lasttoken", "cls": "cls"}


def write_sentence_transformers_files(
    folder: Path, head_weight: torch.Tensor, head_bias: torch.Tensor, pooling: str, chat_template: bool
) -> None:
    """Add the modules backbone -> pooling -> one linear row -> sigmoid to a released folder.

    Args:
        folder: holds config.json, weights and tokenizer already.
        head_weight: `(2, hidden_size)`, of the two-way head.
        head_bias: `(2,)`.
        pooling: "last" or "cls", the folder's `classifier_pooling`.
        chat_template: the pair is rendered by the tokenizer's chat template; otherwise by its own pair template.

    Raises ValueError for another pooling or shape.
    """
    if pooling not in POOLING_MODES:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLING_MODES)}.")
    if head_weight.dim() != 2 or head_weight.shape[0] != 2 or head_bias.shape != (2,):
        raise ValueError(f"The head must be [2, H] and [2], not {[*head_weight.shape]} and {[*head_bias.shape]}.")
    hidden_size = head_weight.shape[1]
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities: dict[str, dict] = {"text": forward}
    if chat_template:
        # Without this entry query and document would be glued together, with no prompt and no word of it.
        modalities["message"] = {**forward, "format": "flat"}
    _write_json(
        folder / "modules.json",
        [
            _module(0, "", "base.modules.transformer.Transformer"),
            _module(1, "1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
            _module(2, "2_Dense", "base.modules.dense.Dense"),
        ],
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "activation_fn": "torch.nn.modules.activation.Sigmoid",
            "keep_in_fp32_modules": ["2.linear"],  # as our own head: near-equal scores must not tie
        },
    )
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "token_embeddings",
        },
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {"embedding_dimension": hidden_size, "pooling_mode": POOLING_MODES[pooling], "include_prompt": True},
    )
    (folder / "2_Dense").mkdir(exist_ok=True)
    _write_json(
        folder / "2_Dense" / "config.json",
        {
            "in_features": hidden_size,
            "out_features": 1,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
            "module_input_name": "sentence_embedding",
            "module_output_name": "scores",
        },
    )
    row = {"linear.weight": head_weight.float().diff(dim=0), "linear.bias": head_bias.float().diff(dim=0)}
    save_file(row, folder / "2_Dense" / "model.safetensors", {"format": "pt"})


def _module(index: int, path: str, name: str) -> dict:
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{name}"}


def _write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
