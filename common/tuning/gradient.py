"""Tune a bank by gradient: each variant against the output of its original block."""

import torch
from torch import nn

from common import distributed
from common.pruning.bank import Bank, Variant
from common.t5.modules import kind_of
from common.t5.walk import Sublayer, walk
from common.text.batches import Batches, share


class BankWeights(nn.Module):
    """The weights of all variants of a bank as parameters, and the frozen original beside them."""

    def __init__(self, network, bank: Bank, device):
        super().__init__()
        self._network = [network.eval().requires_grad_(False)]  # in a list: not a submodule, not saved, not trained
        self.variants: list[Variant] = [bank.read(key) for key in bank.entries]
        self.weights = nn.ParameterList()
        self.slots = []
        for variant in self.variants:
            slots = {}
            for name, weight in variant.weights.items():
                slots[name] = len(self.weights), variant.masks[name].to(device)
                self.weights.append(nn.Parameter(weight.to(device)))
            self.slots.append(slots)

    def masked(self, i: int) -> dict[str, torch.Tensor]:
        """Return variant ``i``'s weights by name, exactly zero outside the masks."""
        return {name: torch.where(mask, self.weights[slot], 0.0) for name, (slot, mask) in self.slots[i].items()}

    def tuned(self):
        """Yield every variant with its present weights."""
        for i, variant in enumerate(self.variants):
            yield Variant(variant.block, variant.rates, {n: w.detach().cpu() for n, w in self.masked(i).items()},
                          variant.masks)


class BlockReconstruction(BankWeights):
    """Mean over all variants of the relative squared error of the block's output, as an objective for training.

    Every variant receives the input its block receives in the original model; an attention's target is the
    attention's output, so that q, k, v and o are tuned together. ``forward`` returns (loss × target tokens, target
    tokens), each block's error weighted by its own tokens: over ``batches`` the loss is the mean of `errors`.
    """

    def __init__(self, network, bank: Bank, batches: Batches, device):
        """Read all variants of a bank; one walk over ``batches`` measures each block's output power E‖y‖²."""
        super().__init__(network, bank, device)
        self.of: dict[str, list[int]] = {}  # block: its variants
        for i, variant in enumerate(self.variants):
            self.of.setdefault(variant.block, []).append(i)
        self.power: dict[str, float] = {}
        self.share: dict[str, float] = {}  # target tokens for each token of the block
        text = share(batches)
        targets, = distributed.sums(sum(int((batch["labels"] >= 0).sum()) for batch in text))
        for sublayer in walk(network, [text], device):
            for block in sublayer.blocks(self.of):
                tokens, total = 0, 0.0
                for stream in sublayer.splits[0]:
                    target = _target(sublayer, block, stream)[stream.valid]
                    total, tokens = total + float(target.square().sum()), tokens + len(target)
                tokens, total = distributed.sums(tokens, total)
                self.power[block], self.share[block] = max(total / tokens, 1e-30), targets / tokens

    def _errors(self, batch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return each variant's (relative squared error, summed over the tokens that count; number of these)."""
        errors = {}
        for sublayer in walk(self._network[0], [[batch]], batch["labels"].device):
            stream = sublayer.splits[0][0]
            for block in sublayer.blocks(self.of):
                target = _target(sublayer, block, stream)
                for i in self.of[block]:
                    difference = (_output(sublayer, block, stream, self.masked(i)) - target)[stream.valid]
                    errors[i] = difference.square().sum() / self.power[block], stream.valid.sum()
        return errors

    def forward(self, batch):
        errors = self._errors(batch)
        return sum(errors[i][0] * self.share[v.block] for i, v in enumerate(self.variants)) / len(errors), (
            batch["labels"] >= 0).sum()

    @torch.no_grad()
    def errors(self, batches: Batches, device) -> list[float]:
        """Return each variant's mean relative error over a split, in the bank's order."""
        sums = torch.zeros(len(self.variants), 2, dtype=torch.float64)
        for batch in distributed.share(batches.fixed(device)):
            for i, (error, tokens) in self._errors(batch).items():
                sums[i] += torch.tensor([float(error), float(tokens)])
        distributed.add_up(sums)
        return (sums[:, 0] / sums[:, 1]).tolist()


def _target(sublayer: Sublayer, block: str, stream) -> torch.Tensor:
    """Return the original block's output (batch, length, out)."""
    if block in (sublayer.name, sublayer.out):
        return sublayer.output(stream)
    with torch.no_grad():
        return sublayer.network.get_submodule(block)(sublayer.inputs(stream)[0][0])


def _output(sublayer: Sublayer, block: str, stream, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the output of a block with a variant's weights, by name (batch, length, out); gradients flow to these."""
    if kind_of(block) == "linear":
        x = sublayer.inner(stream) if block == sublayer.out else sublayer.inputs(stream)[0][0]
        return x @ weights[f"{block}.weight"].T
    def weight(part):
        return weights.get(f"{block}.{part}.weight", getattr(sublayer.module, part).weight)

    return sublayer.mix(stream, weight) @ weight(sublayer.out.rpartition(".")[2]).T
