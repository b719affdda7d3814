"""What a stage will take, out of its files' headers: weights, variants, disk, memory, operations. ``--plan`` prints it.

The text is not read: `PAIRS` pairs of `TOKENS` tokens are assumed. Peaks of memory are read off the code, a term says
what is held at once; benchmarks/scaling.py compares them with measured ones. A multiplication and an addition are two
operations.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from common.least_squares import SOLVED_AT_ONCE
from common.pruning.bank import Key
from common.pruning.configurations import Configuration, removed_count, required_variants
from common.t5.cost import Shape
from common.t5.header import Header
from common.t5.modules import kind_of, members, weight_names
from common.text.batches import BATCH_TOKENS, CALIBRATION_SENTENCES, VALIDATION_SENTENCES

LIBRARIES = 340 << 20  # bytes that torch and what the stages import take
PAIRS, TOKENS = 29_000, 16  # Multi30K has so many pairs; and of tokens 12 to 18 a sentence, by the vocabulary


class Sizes:
    """A model's sizes: ``model`` in bytes as it is in memory, zeros included, ``prunable`` weights with them,
    ``largest`` weights of a tensor; ``widest`` and ``block`` are the inputs and weights of its widest module.
    """

    def __init__(self, header: Header):
        self.header, self.shape = header, Shape.of_header(header)
        c = header.config
        self.d, self.inner, self.widest = c.d_model, c.num_heads * c.d_kv, max(c.d_ff, c.num_heads * c.d_kv)
        self.block = self.d * self.widest
        self.model = 4 * sum(whole for _, whole in header.weights.values())
        self.kept = sum(kept for kept, _ in header.weights.values())
        names = {name for module in header.kinds for name in weight_names(module)}
        self.prunable = sum(whole for name, (_, whole) in header.weights.items() if name in names)
        self.largest = c.vocab_size * self.d
        self.loaded = self.model + 7 * self.largest  # the check that weights are finite takes 7 bytes of each

    def streams(self, sentences: int) -> int:
        """Return the bytes of the encoder's states and of the decoder's before and after a sub-layer."""
        return 4 * self.d * 3 * sentences * TOKENS

    def stored(self, key: Key) -> tuple[int, int, float]:
        """Return (weights with their zeros, how many were left before, kept ones) of what a bank holds of a variant."""
        block, rates = key
        whole, before, kept, of = 0, 0, 0.0, dict(zip(members(block), rates, strict=True))
        for name in weight_names(block):
            module = name.removesuffix(".weight")
            if name in self.header.weights and (rates[0] or module in of):  # q, k and v only if a head is removed
                there, all_of_it = self.header.weights[name]
                own = 0.0 if module == block else of.get(module, 0.0)
                whole, before, kept = whole + all_of_it, before + there, kept + there * (1 - rates[0]) * (1 - own)
        return whole, before, kept


def variants_of(scheme: dict) -> list[Key]:
    """Return the variants that a scheme asks for."""
    return [(block, rates) for block, every in scheme.items() for rates in every]


def bank_bytes(s: Sizes, keys: Iterable[Key]) -> int:
    """Return the bytes of a bank: 4 of each weight that is kept, a bit of each."""
    return int(sum(whole / 8 + 4 * kept for whole, _, kept in map(s.stored, keys)))


def prune(header: Header, keys: list[Key], obs: bool) -> dict[str, int]:
    """Return the plan of prune.py, {what: bytes, number or operations}."""
    s = Sizes(header)
    if not obs:
        return _plan(s.kept, keys, bank_bytes(s, keys), s.model + 40 * s.block, s.prunable * len(keys))
    gram, working = 8 * s.widest ** 2, 8 * BATCH_TOKENS * s.widest
    # The ridge, its factor and inverse; or solving, and sorting what each weight would cost.
    solving = max(5 * gram, 2 * gram + 12 * s.widest ** 2 + 120 * s.block)
    # Those of a stack's self-attentions, which are pruned together.
    layers = {block.partition(".layer")[0] for block, _ in keys if block.endswith("SelfAttention")}
    together = 8 * s.inner ** 2 * max(sum(n.startswith(side) for n in layers) for side in ("encoder", "decoder"))
    return _plan(s.kept, keys, bank_bytes(s, keys), s.loaded + s.streams(CALIBRATION_SENTENCES)
                 + together + max(working, solving), _walk(s, CALIBRATION_SENTENCES) + _factors(s, keys))


def block_level(header: Header, keys: list[Key], solver: str, epochs: int, pairs: int | None) -> dict[str, int]:
    """Return the plan of block-level_finetuning.py; ``pairs``: of the text that gradients are taken on."""
    s = Sizes(header)
    disk = bank_bytes(s, keys)
    if solver != "exact":
        every = 4 * sum(s.stored(key)[0] for key in keys)  # the variants with their zeros
        trained = every if solver == "adamw" else 4 * s.prunable
        held = s.shape.activations(BATCH_TOKENS // TOKENS, TOKENS, TOKENS, teacher=True)
        states = _remembered(s, epochs, pairs or PAIRS) if solver == "joint" else 0
        once = 1 if solver == "joint" else epochs  # what the original does
        return _plan(s.kept, keys, disk, s.loaded + every + 3 * trained + max(trained, held) + states, int(
            (pairs or PAIRS) * s.shape.operations(TOKENS, TOKENS) * (once + epochs * 3 * trained / (4 * s.prunable))))
    gram, working = 8 * s.widest ** 2, 8 * BATCH_TOKENS * s.widest
    count, lost = {}, {}
    for block, rates in keys:
        count[block] = count.get(block, 0) + 1
        if kind_of(block) == "attention" and 0 < rates[0] < 1:
            lost.setdefault(block, {})[rates[0]] = (1 - rates[0]) * s.inner
    together = min(max(count.values(), default=0), max(SOLVED_AT_ONCE // s.block, 1))
    exact = 2 * gram + 12 * s.widest ** 2 + 15 * s.block * together + 75 * s.block * together
    kept = max((sum(widths.values()) for widths in lost.values()), default=0)
    sentences = CALIBRATION_SENTENCES + VALIDATION_SENTENCES
    steps = 4 * sentences * TOKENS * (3 * s.d + s.inner + TOKENS * s.shape.heads()) + 144 * kept * s.d if lost else 0
    return _plan(s.kept, keys, disk, s.loaded + disk + s.streams(sentences) + max(working, exact, steps),
                 _walk(s, sentences) + _factors(s, keys))  # the bank that is read is mapped from its file


def training(header: Header, configuration: Configuration, batch_tokens: int, epochs: int, pairs: int | None,
             teacher: Header | None = None, composes: bool = False) -> dict[str, int]:
    """Return the plan of a stage that trains a complete model.

    Trained is a network without the heads, units and sub-layers that are removed; single weights that are removed are
    zeros in it, which take memory and operations.

    Args:
        configuration: what is composed first.
        composes: whether it is; then the original is held beside it.
    """
    s, pairs, keys = Sizes(header), pairs or PAIRS, list(required_variants(configuration).items())
    kept = s.kept + int(sum(left - before for _, before, left in map(s.stored, keys)))
    layers = {name: n - removed_count(configuration.get(name, 0.0), n) for name, n in s.shape.layers.items()}
    small = replace(s.shape, layers={name: n for name, n in layers.items() if n})
    trained = s.model - 4 * (s.prunable - small.weights())
    held = small.activations(max(batch_tokens // TOKENS, 1), TOKENS, TOKENS, teacher=bool(teacher))
    pruned = trained < s.model or kept < s.model // 4
    # A copy of what is cut, AdamW's moments, the best weights, and gradients as the activations go; a teacher's file.
    peak = s.loaded + pruned * (trained + s.prunable) + 3 * trained + max(trained, held)
    others = (composes or teacher is not None) * Sizes(teacher or header).model
    work = epochs * 3 * small.operations(TOKENS, TOKENS)
    if teacher:
        t = Sizes(teacher)
        others += _remembered(t, epochs, pairs)
        work += t.shape.operations(TOKENS, TOKENS) + (epochs - 1) * 2 * TOKENS * t.largest
    return _plan(kept, keys, int(4 * kept + pruned * s.prunable / 8), peak + others, pairs * work)


def _remembered(s: Sizes, epochs: int, pairs: int) -> int:
    """Return the bytes of the states that a teacher keeps of a text that it is asked for more than once."""
    return 4 * s.d * pairs * TOKENS if epochs > 1 else 0


def _walk(s: Sizes, sentences: int) -> int:
    """Return the operations of the original on a text, and of the Gram matrices of all inputs."""
    return sentences * (s.shape.operations(TOKENS, TOKENS) + 2 * TOKENS * s.shape.squared_inputs())


def _factors(s: Sizes, keys: list[Key]) -> int:
    """Return the operations of the factors and solutions of all variants: some products of a Gram matrix with them."""
    return 40 * len(keys) * s.block * s.widest


def _plan(parameters: int, keys, disk: int, peak: int, operations: int) -> dict[str, int]:
    return {"parameters": parameters, "variants": len(keys), "disk": disk, "memory": LIBRARIES + int(peak),
            "operations": int(operations)}


def show(plan: dict[str, int], writes: Path) -> int:
    """Print a plan; return the exit code of a stage that does nothing else."""
    from common.runtime import available_memory

    there = available_memory()
    print(f"parameters   {plan['parameters']:,}, {4 * plan['parameters'] / 1e9:.3g} GB in float32\n"
          f"variants     {plan['variants']:,}\n"
          f"disk         {plan['disk'] / 1e9:.3g} GB: {writes}\n"
          f"memory       {plan['memory'] / 1e9:.3g} GB at its peak, each process"
          + (f"; the CPU has {there / 1e9:.3g} GB to spare" if there else "")
          + f"\noperations   {plan['operations']:.2g}, floating-point, of a text of {TOKENS} tokens a sentence")
    return 0
