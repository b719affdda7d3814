"""How a step fits into memory: a batch in parts, activations computed twice, a teacher's states; bfloat16 on a GPU."""

import contextlib
import math

import torch

from common import distributed
from common.t5.cost import Shape

# Into more parts a batch is not cut before activations are computed twice, for 1.4 times the time of a step (2
# million weights, one thread): small products are slow, too.
_MOST_PARTS = 4
_SHARE = 0.7  # of the room, which activations may take: others take some, and allocators keep what they free


class Parts:
    """In how many parts a step's gradient is added up, so that --batch-tokens is not bound by memory."""

    def __init__(self, objective, room: float):
        """``room``: bytes for activations on this process's device; of several processes the least counts.

        An ``objective`` without a network takes its batches whole.
        """
        self.network, self.teacher = getattr(objective, "network", None), getattr(objective, "teacher", None)
        self.shape = self.network and Shape.of(self.network)
        self.room = _SHARE * room
        if distributed.size() > 1:
            self.room = -distributed.highest(-int(min(self.room, 1 << 60)))

    def let_read(self, text, device, between) -> None:
        """Let the teacher, if there is one, read the text beforehand (`common.t5.loss.Teacher.read`).

        Not if what it keeps takes more than a quarter of the room; all processes come to the same decision.
        """
        size = self.teacher.size(text) if self.teacher else 0
        if 0 < 4 * size <= self.room:
            self.room -= size
            with autocast(device):
                self.teacher.read(text, device, between)

    def of(self, batch: dict) -> int:
        """Return the number of parts for a batch; sets whether the network computes activations twice."""
        if self.network is None or self.room == math.inf:
            return 1
        rows, source, target = -(-len(batch["labels"]) // distributed.size()), *(
            batch[key].shape[1] for key in ("input_ids", "labels"))
        for recompute in (False, True):
            part = min(rows, self.room // self.shape.activations(1, source, target, recompute,
                                                                     self.teacher is not None))
            if part * _MOST_PARTS >= rows:
                break
        self.network.encoder.recompute = self.network.decoder.recompute = recompute
        return -(-rows // max(int(part), 1))


def autocast(device):
    """Return a context in which a GPU multiplies in bfloat16 (weights, sums and losses stay float32), if it can."""
    there = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if there and torch.cuda.get_device_capability(device)[0] >= 8:  # older ones only emulate it
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()
