"""An exported ONNX file as a model of the pipeline: the same prompts, cuts and batches, computed by ONNX Runtime."""

from pathlib import Path

import onnxruntime
import torch
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


class OnnxReranker(torch.nn.Module):
    """What `score_pairs` and the pipeline ask of a model, on the CPU.

    Raises FileNotFoundError or ValueError for a `file` that is not there or is no ONNX model of an export. Scores of an
    int8 file depend on the batch: activations are quantised over all of it, padding included.
    """

    device, dtype = torch.device("cpu"), torch.float32
    is_causal = False

    def __init__(self, file: str | Path):
        super().__init__()
        file = Path(file)
        folder = file.parent.parent
        if not file.is_file() or not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{file} is not there, or is not in the folder of an export. Name onnx/model.onnx or "
                "onnx/model_int8.onnx of the folder that `querit export --to onnx` wrote."
            )
        self.config = AutoConfig.from_pretrained(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # by itself it leaves out half of two hyper-threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no base class of their own
            raise ValueError(f"ONNX Runtime does not load {file} ({error}). Export it again.") from None
        names = [value.name for value in (*self.session.get_inputs(), *self.session.get_outputs())]
        if names != [*INPUTS, "logits"]:
            raise ValueError(f"{file} has the inputs and outputs {', '.join(names)}: no export of a Querit model.")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        **unused: object,
    ) -> SequenceClassifierOutput:
        """`(batch_size, sequence_length)` each -> logits `(batch_size, 1)`, the log-odds of relevance."""
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        inputs = dict(zip(INPUTS, (input_ids.numpy(), attention_mask.numpy(), segments.numpy()), strict=True))
        return SequenceClassifierOutput(logits=torch.from_numpy(self.session.run(["logits"], inputs)[0]))
