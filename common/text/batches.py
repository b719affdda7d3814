"""Tokenised text in padded batches of similar length (torchtext)."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from common import distributed
from common.errors import UserError
from common.files.atomic import digest
from common.files.provenance import Input
from common.text.corpus import Corpus, read_pairs, sample

BATCH_TOKENS = 2048  # of the longer side, padding included
TRANSLATED_TOKENS = 16_384  # of the source at once, over all beams
VALIDATION_SENTENCES = 400  # that the errors and the losses of variants are measured on
CALIBRATION_SENTENCES = 2000  # block level's attention steps leave 0.014 more loss with 1,000, 0.003 less with 4,000
MAX_TOKENS = 512  # T5's training length; longer sentences are cut there, which is reported
LABEL_PADDING = -100  # the index torch's cross-entropy ignores


def encode(tokenizer, sentences: list[str], eos: int) -> tuple[list[list[int]], int]:
    """Return the token ids of each sentence, ending in ``eos``, and how many were cut at `MAX_TOKENS`.

    Raises:
        UserError: the tokenizer fails on the text, as one without an unknown token does on a new letter.
    """
    try:
        encodings = tokenizer.encode_batch(sentences)
    except Exception as error:
        raise UserError(f"the model's tokenizer cannot read the text: {str(error):.150}") from None
    cut, result = 0, []
    for encoding in encodings:
        ids = encoding.ids if encoding.ids and encoding.ids[-1] == eos else [*encoding.ids, eos]
        if len(ids) > MAX_TOKENS:
            ids, cut = [*ids[:MAX_TOKENS - 1], eos], cut + 1
        result.append(ids)
    return result, cut


class Batches:
    """A tokenised split that yields padded batches of similar length, in an order fixed by seed and epoch."""

    def __init__(self, pairs, model, batch_tokens: int = BATCH_TOKENS, seed: int = 0, folder: str = ""):
        """Tokenise ``pairs`` for a `common.t5.model.Model`; ``folder`` is the text's name in provenances.

        Raises:
            UserError: the tokenizer fails on the text, or knows more tokens than the model.
        """
        from torchtext.data import Dataset, Example, RawField

        config = model.network.config
        tokenizer, eos, prefix = model.tokenizer, config.eos_token_id, model.prefix
        sources, cut = encode(tokenizer, [prefix + s for s, _ in pairs], eos)
        targets, cut_targets = encode(tokenizer, [t for _, t in pairs], eos)
        if cut + cut_targets:
            print(f"{cut + cut_targets:,} sentences were cut at {MAX_TOKENS} tokens", file=sys.stderr)
        if max(max(ids) for ids in (*sources, *targets)) >= config.vocab_size:
            raise UserError("the tokenizer knows more tokens than the model; they do not belong together")
        fields = [("source", RawField()), ("target", RawField())]
        examples = [Example.fromlist([s, t], fields) for s, t in zip(sources, targets, strict=True)]
        for i, example in enumerate(examples):
            example.number = i
        self.dataset = Dataset(examples, fields)
        self.sha256 = digest("\n".join(prefix + "\t".join(pair) for pair in pairs))
        self.batch_tokens, self.seed, self.pad = batch_tokens, seed, config.pad_token_id
        self.folder = folder

    def as_input(self) -> Input:
        """Return the text as an input for `common.files.provenance.provenance`."""
        return Path(self.folder), self.sha256, {}

    def __len__(self) -> int:
        """Number of sentence pairs."""
        return len(self.dataset)

    def epoch(self, number: int | None) -> list:
        """Return the batches (lists of examples) of a training epoch, or in a fixed order for None."""
        from torchtext.data import BucketIterator
        from torchtext.data.utils import RandomShuffler

        longest = 0

        def size(example, count, so_far):
            nonlocal longest
            length = max(len(example.source), len(example.target))
            longest = length if count == 1 else max(longest, length)
            return count * longest

        # By the longer side, which counts: by the target 16 % of the tokens of Multi30K's epoch are padding, so 8 %.
        iterator = BucketIterator(
            self.dataset, self.batch_tokens, sort_key=lambda e: sorted((len(e.source), len(e.target)), reverse=True),
            batch_size_fn=size, train=number is not None, sort_within_batch=True)
        iterator.random_shuffler = RandomShuffler(random.Random(f"{self.seed}/{number}").getstate())
        iterator.create_batches()
        # torchtext yields an empty batch before a sentence that alone exceeds the budget.
        return [batch for batch in iterator.batches if batch]

    def collate(self, examples, device="cpu") -> dict[str, torch.Tensor]:
        """Pad examples to a batch: input_ids, attention_mask (batch, src_len), labels (batch, tgt_len).

        And ``example`` (batch), which stays on the CPU: their numbers in the text.
        """
        from torch.nn.utils.rnn import pad_sequence

        sources = [torch.tensor(e.source) for e in examples]
        targets = [torch.tensor(e.target) for e in examples]
        ids = pad_sequence(sources, batch_first=True, padding_value=self.pad)
        # By length, not by value: a pad token inside a sentence would be a real token.
        attention = torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in sources])[:, None]
        labels = pad_sequence(targets, batch_first=True, padding_value=LABEL_PADDING)
        return {"input_ids": ids.to(device), "attention_mask": attention.long().to(device),
                "labels": labels.to(device), "example": torch.tensor([e.number for e in examples])}

    def fixed(self, device="cpu") -> Iterator[dict[str, torch.Tensor]]:
        """Yield every batch once, in a fixed order."""
        for examples in self.epoch(None):
            yield self.collate(examples, device)


def share(batches: Batches) -> list[dict]:
    """Return this process's share of a text's batches, in a fixed order; at least one, if need be without a token."""
    own = list(distributed.share(batches.fixed()))
    return own or [_without_tokens(next(iter(batches.fixed())))]


def rows(batch: dict, part: int, parts: int) -> tuple[dict, slice]:
    """Return one of so many parts of a batch's sentences, and which these are; padding is the whole batch's."""
    own = slice(part, None, parts)
    if part < len(batch["labels"]):
        return {key: t[own] for key, t in batch.items()}, own
    return _without_tokens(batch), slice(0, 1)


def _without_tokens(batch: dict) -> dict:
    """Return a batch of one sentence in which no token counts."""
    first = {key: t[:1] for key, t in batch.items()}
    return first | {"attention_mask": torch.zeros_like(first["attention_mask"]),
                    "labels": torch.full_like(first["labels"], LABEL_PADDING), "example": batch["example"][:0]}


def training_text(corpus: Corpus, model, batch_tokens: int = BATCH_TOKENS, seed: int = 0) -> Batches:
    """Read and tokenise the training split."""
    return Batches(read_pairs(corpus, "train"), model, batch_tokens, seed, corpus.folder.name)


def validation_text(corpus: Corpus, model, batch_tokens: int = BATCH_TOKENS, sentences: int | None = None) -> Batches:
    """Read and tokenise the validation split, or ``sentences`` of it, always the same ones."""
    pairs = read_pairs(corpus, "val")
    return Batches(sample(pairs, sentences, 0) if sentences else pairs, model, batch_tokens, 0, corpus.folder.name)


def source_text(pairs, model, beams: int = 1) -> Batches:
    """Tokenise the sources alone: of what is to be translated no reference's length says what belongs together."""
    return Batches([(source, "") for source, _ in pairs], model, max(1, TRANSLATED_TOKENS // beams))


def calibration_text(corpus: Corpus, model, seed: int = 0, sentences: int = CALIBRATION_SENTENCES) -> Batches:
    """Read and tokenise the training pairs, drawn by ``seed``, that activations are taken from."""
    pairs = sample(read_pairs(corpus, "train"), sentences, seed)
    return Batches(pairs, model, BATCH_TOKENS, seed, corpus.folder.name)
