"""Tune a bank in composition, on the translation loss: variants learn to work together, once for all configurations."""

import random

import torch
from torch import nn
from torch.func import functional_call

from common.errors import UserError
from common.pruning.bank import Bank
from common.pruning.configurations import Configuration, required_variants
from common.t5.loss import Teacher, network_inputs, token_loss
from common.tuning.gradient import BankWeights

VALIDATION_MIXTURES = 4


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

    In training the loss is that of `common.t5.loss.TranslationLoss` with the original as the teacher.
    """

    def __init__(self, network, bank: Bank, device, configurations: list[Configuration] | None = None, seed: int = 0):
        """Draw from those of ``configurations`` that prune something if given, else from all mixtures of variants.

        Raises:
            UserError: none of them does.
        """
        super().__init__(network, bank, device)
        self.weights.requires_grad_(False)
        self.teacher = Teacher(network)
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

    def masked(self, i: int) -> dict[str, torch.Tensor]:
        """Return variant ``i``'s corrected weights by name, exactly zero outside the masks."""
        return {name: torch.where(mask, self.weights[slot] + self.corrections[self.corrected[name]], 0.0)
                for name, (slot, mask) in self.slots[i].items()}

    def draw(self) -> list[int]:
        """Return the variants of one random composition."""
        def pick(options):
            return options[int(torch.randint(len(options), (1,), device="cpu"))]

        return pick(self.choices) if self.choices else [pick(variants) for variants in self.blocks.values()]

    def composed(self, chosen: list[int], batch):
        """Return (loss sum, tokens) of the original with the chosen variants in place."""
        network = self._network[0]
        inputs, tokens = network_inputs(batch, network.config)
        weights = {name: w for i in chosen for name, w in self.masked(i).items()}
        logits = functional_call(network, weights, (), inputs)
        return token_loss(logits, tokens, self.teacher(batch) if self.training else None)

    def forward(self, batch):
        if self.training:
            return self.composed(self.draw(), batch)
        losses = [self.composed(chosen, batch) for chosen in self.fixed]
        return sum(loss for loss, _ in losses) / len(losses), losses[0][1]
