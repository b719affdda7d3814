"""What a stage will take, out of its files' headers: weights, variants, disk, memory, operations. ``--plan`` prints it.

The text is not read: `PAIRS` pairs of `TOKENS` tokens are assumed. Peaks of memory are read off the code, a term says
what is held at once; benchmarks/memory.py compares them with measured ones. A multiplication and an addition are two
operations.
"""

from collections.abc import Iterable
from pathlib import Path

from common.least_squares import SOLVED_AT_ONCE
from common.pruning.bank import Key
from common.t5.cost import Shape
from common.t5.header import Header
from common.t5.modules import kind_of, members
from common.text.batches import BATCH_TOKENS, CALIBRATION_SENTENCES

LIBRARIES = 340 << 20  # bytes that torch and what the stages import take
PAIRS, TOKENS = 29_000, 20  # Multi30K has so many pairs; and of tokens 12 to 18 a sentence, by the vocabulary
VALIDATION = 1_000  # sentences


class Sizes:
    """A model's sizes in memory, bytes; ``widest`` and ``block`` are the inputs and weights of its widest module."""

    def __init__(self, header: Header):
        c, self.shape = header.config, Shape.of_header(header)
        self.d, self.d_ff, self.inner = c.d_model, c.d_ff, c.num_heads * c.d_kv
        self.parts = ("wi_0", "wi_1", "wo") if c.is_gated_act else ("wi", "wo")
        attentions = c.num_layers + 2 * c.num_decoder_layers
        feed_forwards = c.num_layers + c.num_decoder_layers
        self.prunable = self.d * (4 * self.inner * attentions + len(self.parts) * c.d_ff * feed_forwards)
        self.largest = c.vocab_size * self.d
        self.weights = self.prunable + self.largest * (1 if c.tie_word_embeddings else 2)
        self.model, self.kept = 4 * self.weights, 4 * header.weights
        self.widest = max(c.d_ff, self.inner)
        self.block = self.d * self.widest
        self.loaded = self.model + 7 * self.largest  # the check that weights are finite takes 7 bytes of each

    def streams(self, sentences: int) -> int:
        """Return the bytes of the encoder's states and of the decoder's before and after a sub-layer."""
        return 4 * self.d * 3 * sentences * TOKENS


def variants_of(scheme: dict) -> list[Key]:
    """Return the variants that a scheme asks for."""
    return [(block, rates) for block, every in scheme.items() for rates in every]


def _stored(s: Sizes, key: Key) -> tuple[int, float]:
    """Return (weights, kept ones) of what a bank holds of a variant."""
    (block, rates), kind = key, kind_of(key[0])
    if kind == "linear":
        sizes, gone = [s.d * s.d_ff], [rates[0]]
    elif kind == "attention":
        sizes = [s.d * s.inner] * (4 if rates[0] else 1)  # without q, k and v where no head is removed
        gone = [1 - (1 - rates[0]) * (1 - rates[1]), *[rates[0]] * 3][:len(sizes)]
    else:
        of = dict(zip(members(block), rates, strict=True))
        parts = [name for name in members(block)[1:] if name.rpartition(".")[2] in s.parts]
        sizes, gone = [s.d * s.d_ff] * len(parts), [1 - (1 - rates[0]) * (1 - of[name]) for name in parts]
    return sum(sizes), sum(size * (1 - rate) for size, rate in zip(sizes, gone, strict=True))


def bank_bytes(s: Sizes, keys: Iterable[Key]) -> int:
    """Return the bytes of a bank: 4 of each weight that is kept, a bit of each."""
    return int(sum(whole / 8 + 4 * kept for whole, kept in (_stored(s, key) for key in keys)))


def prune(header: Header, keys: list[Key], obs: bool) -> dict[str, int]:
    """Return the plan of prune.py, {what: bytes, number or operations}."""
    s = Sizes(header)
    if not obs:
        return _plan(s, keys, bank_bytes(s, keys), s.model + 40 * s.block, s.weights * len(keys))
    gram, working = 8 * s.widest ** 2, 8 * BATCH_TOKENS * s.widest
    # The ridge, its factor and inverse; or solving, and sorting what each weight would cost.
    solving = max(5 * gram, 2 * gram + 12 * s.widest ** 2 + 120 * s.block)
    return _plan(s, keys, bank_bytes(s, keys), s.loaded + s.streams(CALIBRATION_SENTENCES)
                 + max(working, solving), _walk(s, CALIBRATION_SENTENCES) + _factors(s, keys))


def block_level(header: Header, keys: list[Key], solver: str, epochs: int, pairs: int | None) -> dict[str, int]:
    """Return the plan of block-level_finetuning.py; ``pairs``: of the text that gradients are taken on."""
    s = Sizes(header)
    disk = bank_bytes(s, keys)
    if solver != "exact":
        every = 4 * sum(_stored(s, key)[0] for key in keys)  # the variants with their zeros
        trained = every if solver == "adamw" else 4 * s.prunable
        held = s.shape.activations(BATCH_TOKENS // TOKENS, TOKENS, TOKENS)
        return _plan(s, keys, disk, s.loaded + every + 3 * trained + max(trained, held), int(
            epochs * (pairs or PAIRS) * s.shape.operations(TOKENS, TOKENS) * (1 + 3 * trained / (4 * s.prunable))))
    gram, working = 8 * s.widest ** 2, 8 * BATCH_TOKENS * s.widest
    count, lost = {}, {}
    for block, rates in keys:
        count[block] = count.get(block, 0) + 1
        if kind_of(block) == "attention" and 0 < rates[0] < 1:
            lost.setdefault(block, {})[rates[0]] = (1 - rates[0]) * s.inner
    together = min(max(count.values()), max(SOLVED_AT_ONCE // s.block, 1))
    exact = 2 * gram + 12 * s.widest ** 2 + 15 * s.block * together + 75 * s.block * together
    kept = max((sum(widths.values()) for widths in lost.values()), default=0)
    tokens = (CALIBRATION_SENTENCES + VALIDATION) * TOKENS
    steps = 4 * tokens * (3 * s.d + s.inner + TOKENS * s.shape.heads()) + 144 * kept * s.d if lost else 0
    return _plan(s, keys, disk, s.loaded + s.streams(CALIBRATION_SENTENCES + VALIDATION)
                 + max(working, exact, steps), _walk(s, CALIBRATION_SENTENCES + VALIDATION) + _factors(s, keys))


def training(header: Header, keys: list[Key], batch_tokens: int, epochs: int, pairs: int | None,
             teacher: bool) -> dict[str, int]:
    """Return the plan of a stage that trains a complete model; ``keys`` are of what it composes first."""
    s, pairs = Sizes(header), pairs or PAIRS
    stored = [_stored(s, key) for key in keys]
    kept = s.kept - 4 * sum(whole - left for whole, left in stored)
    held = s.shape.activations(max(batch_tokens // TOKENS, 1), TOKENS, TOKENS)
    whole = s.shape.operations(TOKENS, TOKENS)
    forward = whole * kept / s.kept
    # A copy of what is cut, AdamW's moments, the best weights, and gradients as the activations go; a teacher's file.
    cut = kept if kept < s.model else 0
    peak = s.loaded + cut + 3 * kept + max(kept, held) + teacher * s.model
    return _plan(s, keys, int(kept + bool(cut) * s.prunable / 8), peak, int(epochs * pairs * (
        3 * forward + teacher * whole)))


def _walk(s: Sizes, sentences: int) -> int:
    """Return the operations of the original on a text, and of the Gram matrices of all inputs."""
    return sentences * (s.shape.operations(TOKENS, TOKENS) + 2 * TOKENS * s.shape.squared_inputs())


def _factors(s: Sizes, keys: list[Key]) -> int:
    """Return the operations of the factors and solutions of all variants: some products of a Gram matrix with them."""
    return 40 * len(keys) * s.block * s.widest


def _plan(s: Sizes, keys, disk: int, peak: int, operations: int) -> dict[str, int]:
    return {"parameters": s.kept // 4, "variants": len(keys), "disk": disk, "memory": LIBRARIES + int(peak),
            "operations": int(operations)}


def show(plan: dict[str, int], writes: Path) -> int:
    """Print a plan; return the exit code of a stage that does nothing else."""
    from common.runtime import available_memory

    there = available_memory()
    print(f"parameters   {plan['parameters']:,}, {4 * plan['parameters'] / 1e9:.3g} GB in float32\n"
          f"variants     {plan['variants']:,}\n"
          f"disk         {plan['disk'] / 1e9:.3g} GB: {writes}\n"
          f"memory       {plan['memory'] / 1e9:.3g} GB at its peak, each process"
          + (f"; {there / 1e9:.3g} GB are available here" if there else "")
          + f"\noperations   {plan['operations']:.2g}, floating-point, of a text of {TOKENS} tokens a sentence")
    return 0
