"""The translation loss, what a T5 is called with for it, and its mean over a split."""

from collections.abc import Callable

import torch
from torch import nn

from common import distributed
from common.runtime import progress

# Of each target token's probability. Half and half is better than either in joint tuning and in most trainings; the
# teacher alone (1) gave the best BLEU at a slightly higher loss.
DISTILLATION = 0.5
READ_AT_ONCE = 64  # sentences


class Teacher:
    """A network's logits at the target tokens of training batches, ``teacher(batch)``: (tokens, vocabulary).

    It says the same in every epoch. So it can `read` the text before: then its decoder's states are there, and what is
    left for each batch is ``lm_head``.
    """

    def __init__(self, network):
        self.network, self._states = network, None

    def size(self, text) -> int:
        """Return the bytes that are kept of a text (`common.text.batches.Batches`): d_model numbers a target token."""
        return 4 * self.network.config.d_model * sum(len(example.target) for example in text.dataset.examples)

    def read(self, text, device, between: Callable[[], None] = lambda: None) -> None:
        """Run over a text, in a fixed order, so that a run that is resumed has the same bits.

        Args:
            device: the network's; the states are kept in the CPU's memory.
            between: called after every batch.
        """
        ends = torch.tensor([len(example.target) for example in text.dataset.examples]).cumsum(0)
        self._first = [0, *ends.tolist()]
        states = torch.zeros(self._first[-1], self.network.config.d_model)
        for examples in progress(list(distributed.share(text.epoch(None))), "teacher reads the text"):
            for at in range(0, len(examples), READ_AT_ONCE):
                batch = text.collate(examples[at:at + READ_AT_ONCE], device)
                states[self._places(batch)] = self._run(batch).cpu()
            between()
        for part in states.split(max((1 << 24) // states.shape[1], 1)):
            distributed.add_up(part)
        self._states = states

    @torch.no_grad()
    def __call__(self, batch: dict) -> torch.Tensor:
        states = self._run(batch) if self._states is None else self._states[self._places(batch)]
        return self.network.head(states.to(batch["labels"].device))

    @torch.no_grad()
    def _run(self, batch: dict) -> torch.Tensor:
        return self.network.states(**network_inputs(batch, self.network.config)[0])

    def _places(self, batch: dict) -> torch.Tensor:
        numbers = batch["example"].tolist()
        return torch.cat([torch.arange(0), *(torch.arange(self._first[i], self._first[i + 1]) for i in numbers)])


class TranslationLoss(nn.Module):
    """Cross-entropy of a T5 on a batch: ``forward`` returns (sum over target tokens, number of tokens).

    With a teacher, in training mode alone, a token's target is not the reference's token alone, but by the share
    `DISTILLATION` the teacher's distribution, given the tokens before it. So what the teacher learned with label
    smoothing, dropout or more text is not forgotten. (Hinton et al. 2015, "Distilling the Knowledge in a Neural
    Network", section 2, at temperature 1.) What is evaluated is always the plain cross-entropy.
    """

    def __init__(self, network, teacher: Teacher | None = None):
        super().__init__()
        self.network, self.teacher = network, teacher
        self.training = network.training  # else `evaluate` would leave a network that was evaluated in training mode

    def forward(self, batch):
        inputs, tokens = network_inputs(batch, self.network.config)
        distil = self.training and self.teacher is not None
        return token_loss(self.network(**inputs), tokens, self.teacher(batch) if distil else None)


def token_loss(logits: torch.Tensor, tokens: torch.Tensor,
               aims: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """Return (loss, summed over target tokens, number of them); see `TranslationLoss`.

    Args:
        logits: (tokens, vocabulary).
        tokens: (tokens,), the reference's.
        aims: the teacher's logits, shaped as ``logits``.
    """
    if aims is not None:
        targets = aims.softmax(dim=-1).mul_(DISTILLATION)
        targets.scatter_add_(1, tokens[:, None], targets.new_full((len(tokens), 1), 1 - DISTILLATION))
    else:
        targets = tokens
    return nn.functional.cross_entropy(logits, targets, reduction="sum"), len(tokens)


def network_inputs(batch: dict, config) -> tuple[dict, torch.Tensor]:
    """Return what a T5 is called with, by name, for its logits at every target token of a batch, and these tokens."""
    where = batch["labels"] >= 0
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "where": where,
            "decoder_input_ids": shift_right(batch["labels"], config)}, batch["labels"][where]


def shift_right(labels: torch.Tensor, config) -> torch.Tensor:
    """Return the decoder's input for ``labels`` (batch, tgt_len): start token first, label padding as pad."""
    start = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1]], dim=1).masked_fill_(
        torch.cat([torch.zeros_like(start), labels[:, :-1]], dim=1) < 0, config.pad_token_id)


@torch.no_grad()
def evaluate(objective: nn.Module, batches, device) -> float:
    """Return the objective's loss per token over a split (`Batches`), in evaluation mode (no dropout)."""
    was_training = objective.training
    objective.eval()
    total = count = 0.0
    for batch in distributed.share(batches.fixed(device)):
        loss, n = objective(batch)
        total, count = total + float(loss), count + float(n)
    objective.train(was_training)
    total, count = distributed.sums(total, count)
    return total / count
