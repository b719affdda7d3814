"""Which modules of a T5 can be pruned, of which kind they are, and which block they are tuned in."""

import re

_STACK = r"(encoder|decoder)\.block\.\d+\.layer\.\d+\."
_ATTENTION = re.compile(_STACK + r"(SelfAttention|EncDecAttention)")
_OUT = re.compile(_STACK + r"(SelfAttention|EncDecAttention)\.o")
_FEED_FORWARD = re.compile(_STACK + r"DenseReluDense")
_DENSE = re.compile(_STACK + r"DenseReluDense\.(wi|wi_0|wi_1|wo)")

HEAD_PARTS = ("q", "k", "v")  # pruned together, head by head
UNIT_PARTS = ("wi", "wi_0", "wi_1")  # pruned together, hidden unit by hidden unit; a model has the first or the others


def kind_of(name: str) -> str | None:
    """Return what is pruned of a module, or None if nothing ever is.

    ``"attention"``: whole heads; ``"feed-forward"``: whole hidden units; ``"linear"``: single weights.
    """
    if _ATTENTION.fullmatch(name):
        return "attention"
    if _FEED_FORWARD.fullmatch(name):
        return "feed-forward"
    if _OUT.fullmatch(name) or _DENSE.fullmatch(name):
        return "linear"
    return None


def parent_of(name: str) -> str | None:
    """Return the attention of an ``o``, the feed-forward of its linear modules, None for other modules."""
    return name.rpartition(".")[0] if _OUT.fullmatch(name) or _DENSE.fullmatch(name) else None


def members(block: str) -> tuple[str, ...]:
    """Return the modules of a tuning block, in the order their rates are listed in.

    An attention is tuned with its ``o``, a feed-forward that loses hidden units with its linear modules; these are
    blocks of their own where no unit is removed.
    """
    kind = kind_of(block)
    if kind == "attention":
        return block, f"{block}.o"
    if kind == "feed-forward":
        return block, *(f"{block}.{part}" for part in (*UNIT_PARTS, "wo"))
    return (block,)


def is_block(name: str) -> bool:
    """Tell whether a module can be a tuning block: every prunable one but an attention's ``o``."""
    return kind_of(name) is not None and not _OUT.fullmatch(name)


def prunable(model) -> dict[str, str]:
    """Return {module name: kind} of a T5 model, in the order of ``model.named_modules()``."""
    return {name: kind for name, _ in model.named_modules() if (kind := kind_of(name))}


def weight_names(block: str) -> tuple[str, ...]:
    """Return the names of the weights a variant of ``block`` replaces, in the model's ``state_dict``.

    Of a feed-forward those of gated and of plain ones; a model has either.
    """
    kind = kind_of(block)
    if kind == "linear":
        return (f"{block}.weight",)
    return tuple(f"{block}.{part}.weight" for part in ((*HEAD_PARTS, "o") if kind == "attention" else
                                                       (*UNIT_PARTS, "wo")))
