"""Tune a bank by gradient: each variant against its original block, or in composition on the translation loss."""

import random

import torch
from torch import nn
from torch.func import functional_call

from common.bank import Bank, Variant
from common.configs import Configuration, required_variants
from common.data import Batches
from common.files import UserError
from common.reconstruction import run_stacks, valid_tokens
from common.training import network_inputs, predict, token_loss

VALIDATION_MIXTURES = 4


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
    """Mean over all variants of the relative squared error of the block's output, as an objective for `fit`.

    Every variant receives the input its block receives in the original model; an attention's target is the
    attention's output, so that q, k, v and o are tuned together. ``forward`` returns (loss × tokens, tokens).
    """

    def __init__(self, network, bank: Bank, batches: Batches, device):
        """Read all variants of a bank; one pass over ``batches`` measures each block's output power E‖y‖²."""
        super().__init__(network, bank, device)
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

    def _errors(self, batch) -> list[torch.Tensor]:
        """Return each variant's relative squared error on a batch."""
        seen, errors = self._capture(batch), []
        for i, variant in enumerate(self.variants):
            args, kwargs, target = seen[variant.block]
            weights = {name.removeprefix(f"{variant.block}."): w for name, w in self.masked(i).items()}
            output = functional_call(self._network[0].get_submodule(variant.block), weights, args, kwargs)
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


class JointTranslation(BankWeights):
    """Translation loss of randomly composed models: variants learn to work together, once for all configurations.

    Trained is one correction for each weight of the original, added to that weight in every variant that keeps it.
    So whatever is drawn teaches all variants of a block, mild and harsh, and what differs between them stays what
    block level found. (Sharing of weights between networks of different sizes: Yu & Huang 2019, "Universally
    Slimmable Networks and Improved Training Techniques", section 3.) Training each variant's own weights instead
    gets less than half as far in as many steps: docs/experiment.md.

    Every training batch composes the original with one variant of each block, drawn from the global random state
    (which checkpoints keep). In evaluation mode the loss is the mean over a fixed set of configurations: up to four,
    spread over those given, or mixtures drawn by ``seed``. No dropout.

    In training the loss is that of `common.training.TranslationLoss` with the original as the teacher.
    """

    def __init__(self, network, bank: Bank, device, configurations: list[Configuration] | None = None, seed: int = 0,
                 share: float = 0.5):
        """Draw from those of ``configurations`` that prune something if given, else from all mixtures of variants.

        Args:
            share: of distillation in the loss.

        Raises:
            UserError: none of them does.
        """
        super().__init__(network, bank, device)
        self.weights.requires_grad_(False)
        shapes = {name: weight.shape for variant in self.variants for name, weight in variant.weights.items()}
        self.corrections = nn.ParameterList(torch.zeros(shape, device=device) for shape in shapes.values())
        self.corrected = {name: i for i, name in enumerate(shapes)}
        place = {variant.key: i for i, variant in enumerate(self.variants)}
        self.blocks: dict[str, list[int]] = {}
        for key in sorted(place):  # what a seed draws does not depend on the order in which a bank was written
            self.blocks.setdefault(key[0], []).append(place[key])
        self.choices = [[place[key] for key in required_variants(c).items()] for c in configurations or ()]
        self.choices = [chosen for chosen in self.choices if chosen]
        if configurations and not self.choices:
            raise UserError("none of the configurations prunes anything; there is nothing to tune")
        draw = random.Random(f"mixtures/{seed}")
        spread = {len(self.choices) * (2 * i + 1) // (2 * VALIDATION_MIXTURES) for i in range(VALIDATION_MIXTURES)}
        self.fixed = [self.choices[i] for i in sorted(spread) if self.choices] or [
            [draw.choice(variants) for variants in self.blocks.values()] for _ in range(VALIDATION_MIXTURES)]
        self.share = share

    def masked(self, i: int) -> dict[str, torch.Tensor]:
        """Return variant ``i``'s corrected weights by name, exactly zero outside the masks."""
        return {name: torch.where(mask, self.weights[slot] + self.corrections[self.corrected[name]], 0.0)
                for name, (slot, mask) in self.slots[i].items()}

    def draw(self) -> list[int]:
        """Return the variants of one random composition."""
        def pick(options):
            return options[int(torch.randint(len(options), (1,)))]

        return pick(self.choices) if self.choices else [pick(variants) for variants in self.blocks.values()]

    def composed(self, chosen: list[int], batch):
        """Return (loss sum, tokens) of the original with the chosen variants in place."""
        network = self._network[0]
        inputs = network_inputs(batch, network.config)
        weights = {name: w for i in chosen for name, w in self.masked(i).items()}
        logits = functional_call(network, weights, (), inputs).logits
        aims = predict(network, inputs) if self.training and self.share else None
        return token_loss(logits, batch["labels"], aims=aims, share=self.share)

    def forward(self, batch):
        if self.training:
            return self.composed(self.draw(), batch)
        losses = [self.composed(chosen, batch) for chosen in self.fixed]
        return sum(loss for loss, _ in losses) / len(losses), losses[0][1]
