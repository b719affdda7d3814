"""A pruned model as it is trained: shrunk, with masks for the single weights that are removed from what is left."""

from functools import partial

import torch

from common.t5.model import Model
from common.t5.shrink import shrunk, used


class Pruned:
    """While the block runs, ``network`` is trained in the place of a model's own; then the model gets its weights.

    What masks remove altogether (heads, hidden units, sub-layers) takes no part, and no time. A single removed weight
    gets no gradient, so that AdamW leaves it exactly zero: its moments stay 0, so neither the step nor weight decay
    moves it, and it counts in no norm. Up to rounding, that is masking in the forward pass.
    """

    def __init__(self, model: Model, device="cpu"):
        """``model`` is mutated: its network comes to the CPU, and removed weights become 0; ``device``: of training."""
        self._whole, self._handles = model.network.cpu(), []
        with torch.no_grad():
            for name, mask in model.masks.items():
                self._whole.get_parameter(name).mul_(mask)
        self.network, self._origins = shrunk(self._whole, used(self._whole, model.masks))
        for name, parameter in self.network.requires_grad_(True).to(device).named_parameters():
            origin = self._origins[name]
            mask = model.masks.get(origin.name)
            if mask is not None and not (mask := origin.of(mask)).all():
                self._handles.append(parameter.register_post_accumulate_grad_hook(partial(
                    _mask_gradient, mask.to(device))))

    def __enter__(self):
        return self.network

    @torch.no_grad()
    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        for name, parameter in self.network.named_parameters():
            self._origins[name].write(parameter.cpu(), self._whole)


def _mask_gradient(mask: torch.Tensor, parameter: torch.nn.Parameter) -> None:
    parameter.grad.mul_(mask)
