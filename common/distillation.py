"""Block-level fine-tuning by gradient: all variants at once, against one forward pass of the frozen original."""

import torch
from torch import nn
from torch.func import functional_call

from common.bank import Bank, Variant
from common.data import Batches
from common.reconstruction import run_stacks, valid_tokens


class BlockReconstruction(nn.Module):
    """Mean over all variants of the relative squared error of the block's output, as an objective for `fit`.

    Every variant receives the input its block receives in the original model; an attention's target is the
    attention's output, so that q, k, v and o are tuned together. ``forward`` returns (loss × tokens, tokens).
    """

    def __init__(self, network, bank: Bank, batches: Batches, device):
        """Read all variants of a bank; one pass over ``batches`` measures each block's output power E‖y‖²."""
        super().__init__()
        self._network = [network.eval().requires_grad_(False)]  # in a list: not a submodule, not saved, not trained
        self.variants: list[Variant] = [bank.read(key) for key in bank.entries]
        self.weights = nn.ParameterList()
        self.slots = []
        for variant in self.variants:
            slots = {}
            for name, weight in variant.weights.items():
                slots[name.removeprefix(variant.block + ".")] = len(self.weights), variant.masks[name].to(device)
                self.weights.append(nn.Parameter(weight.to(device)))
            self.slots.append(slots)
        self.blocks = list(dict.fromkeys(v.block for v in self.variants))
        self.power = dict.fromkeys(self.blocks, 0.0)
        tokens = dict.fromkeys(self.blocks, 0)
        for batch in batches.fixed(device):
            for block, (_, _, output) in self._capture(batch).items():
                valid = valid_tokens(block, batch)
                self.power[block] += float(output[valid].square().sum())
                tokens[block] += int(valid.sum())
        self.power = {block: max(p / tokens[block], 1e-30) for block, p in self.power.items()}

    @torch.no_grad()
    def _capture(self, batch) -> dict[str, tuple]:
        """Return {block: (args, kwargs, output)} of one pass of the original."""
        network, seen = self._network[0], {}

        def watch(block):
            def hook(module, args, kwargs, output):
                seen[block] = args, kwargs, output[0] if isinstance(output, tuple) else output
            return hook

        hooks = [network.get_submodule(b).register_forward_hook(watch(b), with_kwargs=True) for b in self.blocks]
        try:
            run_stacks(network, batch)
        finally:
            for handle in hooks:
                handle.remove()
        return seen

    def masked(self, i: int) -> dict[str, torch.Tensor]:
        """Return variant ``i``'s weights by their name inside the block, exactly zero outside the masks."""
        return {name: torch.where(mask, self.weights[slot], 0.0) for name, (slot, mask) in self.slots[i].items()}

    def _errors(self, batch) -> list[torch.Tensor]:
        """Return each variant's relative squared error on a batch."""
        seen, errors = self._capture(batch), []
        for i, variant in enumerate(self.variants):
            args, kwargs, target = seen[variant.block]
            output = functional_call(self._network[0].get_submodule(variant.block), self.masked(i), args, kwargs)
            output = output[0] if isinstance(output, tuple) else output
            valid = valid_tokens(variant.block, batch)
            errors.append((output - target)[valid].square().sum() / (self.power[variant.block] * valid.sum()))
        return errors

    def forward(self, batch):
        tokens = (batch["labels"] >= 0).sum()
        return sum(self._errors(batch)) / len(self.variants) * tokens, tokens

    @torch.no_grad()
    def errors(self, batches: Batches, device) -> list[float]:
        """Return each variant's mean relative error over a split."""
        total, count = torch.zeros(len(self.variants)), 0
        for batch in batches.fixed(device):
            tokens = int((batch["labels"] >= 0).sum())
            total, count = total + tokens * torch.stack(self._errors(batch)).cpu(), count + tokens
        return (total / count).tolist()

    def tuned(self):
        """Yield every variant with its present weights."""
        for i, variant in enumerate(self.variants):
            weights = {f"{variant.block}.{name}": w.detach().cpu() for name, w in self.masked(i).items()}
            yield Variant(variant.block, variant.rates, weights, variant.masks)
