"""Which modules of a T5 can be pruned, of which kind they are, and which block they are tuned in."""

import re

_STACK = r"(encoder|decoder)\.block\.\d+\.layer\.\d+\."
_ATTENTION = re.compile(_STACK + r"(SelfAttention|EncDecAttention)")
_OUT = re.compile(_STACK + r"(SelfAttention|EncDecAttention)\.o")
_FEED_FORWARD = re.compile(_STACK + r"DenseReluDense\.(wi|wi_0|wi_1|wo)")

HEAD_PARTS = ("q", "k", "v")  # pruned together, head by head


def kind_of(name: str) -> str | None:
    """Return ``"attention"`` (whole heads are pruned), ``"linear"`` (single weights), or None (never pruned)."""
    if _ATTENTION.fullmatch(name):
        return "attention"
    if _OUT.fullmatch(name) or _FEED_FORWARD.fullmatch(name):
        return "linear"
    return None


def block_of(name: str) -> str:
    """Return the tuning block a prunable module belongs to: ``o`` is tuned with its attention, others alone."""
    return name.removesuffix(".o") if _OUT.fullmatch(name) else name


def members(block: str) -> tuple[str, ...]:
    """Return the modules of a tuning block, in the order their rates are listed in."""
    return (block, f"{block}.o") if kind_of(block) == "attention" else (block,)


def prunable(model) -> dict[str, str]:
    """Return {module name: kind} of a T5 model, in the order of ``model.named_modules()``."""
    return {name: kind for name, _ in model.named_modules() if (kind := kind_of(name))}


def weight_names(block: str) -> tuple[str, ...]:
    """Return the names of the weights a variant of ``block`` replaces, in the model's ``state_dict``."""
    if kind_of(block) == "attention":
        return tuple(f"{block}.{part}.weight" for part in (*HEAD_PARTS, "o"))
    return (f"{block}.weight",)
