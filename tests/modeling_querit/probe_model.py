"""A model that tells of the process that computes it. By itself, since worker processes import it."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from modeling_querit.modeling_querit import QueritForSequenceClassification

THREADS, WEIGHTS, NAN, WAIT, GO, OUT_OF_MEMORY, DIE = range(100, 107)


class ProbeModel(QueritForSequenceClassification):
    """A pair's logit is the id of the process that computed it, or what one of the tokens above asks for."""

    def forward(self, input_ids, **_):
        def asked(token):
            return (input_ids == token).any(1)

        if asked(DIE).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if asked(OUT_OF_MEMORY).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        folder = Path(self.config.signs)
        if asked(GO).any():
            (folder / "go").touch()
        if asked(WAIT).any():
            (folder / "waiting").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        logits = torch.full((len(input_ids),), float(os.getpid()))
        logits[asked(THREADS)] = torch.get_num_threads()
        logits[asked(WEIGHTS)] = sum(parameter.flatten()[0].item() for parameter in self.parameters())
        logits[asked(NAN)] = torch.nan
        return SimpleNamespace(logits=logits.unsqueeze(-1))
