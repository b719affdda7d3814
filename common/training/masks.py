"""Masks kept in force while a model is trained."""

from functools import partial

import torch


class Masks:
    """While the block runs, removed weights get no gradient, so that AdamW leaves them exactly zero.

    A removed weight is 0 and its moments stay 0, so neither the step nor weight decay moves it; its gradient counts in
    no norm. (Bit-identical to masking in the forward pass, without a masked copy of the weights.)
    """

    def __init__(self, network: torch.nn.Module, masks: dict[str, torch.Tensor]):
        """``masks`` by weight name, True where a weight is kept. Mutates the network: removed weights become 0."""
        self._handles = []
        for name, mask in masks.items():
            parameter = network.get_parameter(name)
            mask = mask.to(parameter.device)
            with torch.no_grad():
                parameter.mul_(mask)
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(_mask_gradient, mask)))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()


def _mask_gradient(mask: torch.Tensor, parameter: torch.nn.Parameter) -> None:
    parameter.grad.mul_(mask)
