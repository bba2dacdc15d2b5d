"""Experts on a CPU: their weights in the order in which oneDNN multiplies them, and in no other.

On an EPYC a layer of 128 experts with 32 tokens for each takes two thirds of the time so in bfloat16, and half in
float32. Experts are most of their model, too much to hold twice as `PackedLinear` does: the plain weights are freed,
and made again, the same bit for bit, when somebody asks for more than a forward pass.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .linear_querit import AVAILABLE, ONEDNN

ROWS = 32  # the order is chosen for products of so many rows: an expert's share of a batch
WEIGHTS = ("gate_up_proj", "down_proj")
# The one layout that is packed, as transformers' `use_experts_implementation` names it.
YES, NO = ("is_concatenated", "has_gate"), ("is_transposed", "has_bias", "has_post_expert_norm")
# What is replaced: what transformers sets by itself, and its loop. Any other was asked for, and is kept.
IMPLEMENTATIONS = (None, "grouped_mm", "eager")


class PackedExperts(nn.Module):
    """Experts that multiply packed weights. `packed_class` makes the subclass of this and of the experts' own class.

    Their parameters are on the meta device: shapes and counts are true, values can be neither read nor changed. The
    real ones are in `state_dict`, a copy and a pickle. What moves, converts, loads or trains the experts, or runs them
    in another way than this, first makes them what they were, for good; `model.cpu()` does no more than that.
    """

    original: type[nn.Module]
    packed: dict[str, list[torch.Tensor]]
    config: PreTrainedConfig
    down_proj: nn.Parameter
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def pack(self) -> None:
        self.packed = {}
        for name in WEIGHTS:  # the first is freed before the second is packed
            weight = self.get_parameter(name)
            self.packed[name] = [ONEDNN._reorder_linear_weight(matrix, ROWS) for matrix in weight.detach()]
            freed = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
            self._parameters[name] = weight = freed

    @torch.compiler.disable
    def unpack(self) -> None:
        for name in list(self.packed):
            weight = self._unpacked(name)
            try:  # an optimizer may hold the parameter: its place is not given to another
                torch.utils.swap_tensors(self._parameters[name], weight)
            except RuntimeError:  # something refers to it weakly
                self._parameters[name] = weight
            del self.packed[name]
            # The C library would keep what is freed, in pieces too small for the weights that come next.
            with suppress(AttributeError, OSError, TypeError):  # it is not glibc
                ctypes.CDLL(None).malloc_trim(0)
        del self.packed
        self.__class__ = self.original  # type: ignore[assignment]

    def _unpacked(self, name: str) -> nn.Parameter:
        freed = self.get_parameter(name)
        with torch.inference_mode(False):  # a tensor of inference mode could not be trained
            weight = torch.empty_like(freed, device="cpu")
            for matrix, packed in zip(weight, self.packed[name], strict=True):
                matrix.copy_(packed.to_dense())
            return nn.Parameter(weight, freed.requires_grad)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        other_use = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        other_input = hidden_states.device.type != "cpu" or hidden_states.dtype != self.down_proj.dtype
        if other_use or other_input or self.config._experts_implementation not in IMPLEMENTATIONS:
            self.unpack()
            return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        experts = top_k_index.flatten()
        order = experts.argsort(stable=True)
        # One number more than there are experts stands for none of them: it comes last, and `zip` leaves it out.
        counts = experts.bincount().tolist()
        tokens = (order // top_k_index.shape[1]).split(counts)
        scales = top_k_weights.flatten()[order].unsqueeze(1).split(counts)
        # Summed as they come, in transformers' order: kept apart and summed at the end, it takes twice the time.
        output = torch.zeros_like(hidden_states)
        for rows, scale, gate_up, down in zip(tokens, scales, *self.packed.values(), strict=False):
            if len(rows):
                inner = self._apply_gate(_linear(hidden_states[rows], gate_up))
                output.index_add_(0, rows, (_linear(inner, down) * scale).to(output.dtype))
        return output

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in WEIGHTS:
            weight = self._unpacked(name)
            destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args, **kwargs):
        self.unpack()
        self._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self.unpack()
        return self._apply(fn, recurse)

    def __reduce_ex__(self, protocol):
        plain = self.original.__new__(self.original)
        plain.__dict__.update(self.__dict__, _parameters={name: self._unpacked(name) for name in WEIGHTS})
        del plain.packed
        return plain.__reduce_ex__(0)  # in later ones, pickle takes no other class than the object's own


def _linear(input: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return ONEDNN._linear_pointwise(input, packed, None, "none", [], "")


@cache
def packed_class(original: type) -> type[PackedExperts]:
    return type(f"Packed{original.__name__}", (PackedExperts, original), {"original": original})


def can_pack(module: nn.Module) -> bool:
    if set(module._parameters) != set(WEIGHTS) or "forward" in vars(module):  # biases or scales; a wrapped forward
        return False
    if not all(getattr(module, name, False) for name in YES) or any(getattr(module, name, False) for name in NO):
        return False
    if getattr(module.config, "_experts_implementation", None) not in IMPLEMENTATIONS:
        return False
    gate_up, down = weights = [module.get_parameter(name) for name in WEIGHTS]
    if gate_up.dim() != 3 or down.dim() != 3 or gate_up.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        return False
    plain = all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in weights)
    return plain and gate_up.dtype == down.dtype and down.dtype in (torch.bfloat16, torch.float32)


def pack_experts(model: nn.Module) -> None:
    """Turn each experts module of `model` on the CPU, in bfloat16 or float32, into `PackedExperts`, in place.

    Those of another layout, quantised ones among them, are left alone, and so is an implementation asked for.
    """
    for module in model.modules() if AVAILABLE else ():
        if can_pack(module):
            experts: Any = module
            experts.__class__ = packed_class(experts.__class__)
            try:
                experts.pack()
            except RuntimeError:  # oneDNN does not take this dtype on this CPU
                experts.unpack()
