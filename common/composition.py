"""Make variants out of an original model, and complete models out of variants."""

from collections.abc import Iterator
from pathlib import Path

import torch

from common import masking
from common.bank import Bank, Variant
from common.bank import load as load_bank
from common.configs import Configuration, Scheme, check_modules, nth, read_configurations, required_variants
from common.files import UserError, digest
from common.models import Model
from common.models import load as load_model
from common.modules import HEAD_PARTS, kind_of, prunable


def heads_of(network) -> int:
    """Return the number of attention heads of a T5 (the same in every layer)."""
    return network.config.num_heads


def prune_block(network, block: str, rates: tuple[float, ...]) -> Variant:
    """Return the variant of a block at the given rates, chosen by l1 norm; the network is not changed.

    A block whose head rate is 0 has only its out-projection in the variant.

    Raises:
        UserError: the head rate would remove every head.
    """
    weights = {f"{block}.weight": network.get_submodule(block).weight.detach()} if kind_of(block) == "linear" else {
        f"{block}.{part}.weight": network.get_submodule(f"{block}.{part}").weight.detach()
        for part in ((*HEAD_PARTS, "o") if rates[0] else ("o",))}
    if kind_of(block) == "linear":
        masks = {name: masking.magnitude_mask(w, rates[0]) for name, w in weights.items()}
    else:
        o_mask = masking.magnitude_mask(weights[f"{block}.o.weight"], rates[1])
        masks = {f"{block}.o.weight": o_mask}
        if rates[0]:
            q, k, v = (weights[f"{block}.{part}.weight"] for part in HEAD_PARTS)
            try:
                kept = masking.head_mask(masking.head_scores(q, k, v, heads_of(network)), rates[0])
            except UserError as error:
                raise UserError(f"{block}: {error}") from None
            parts = masking.attention_masks(kept, q, o_mask)
            masks = {f"{block}.{part}.weight": mask for part, mask in parts.items()}
    kept_weights = {name: torch.where(masks[name], w, 0.0) for name, w in weights.items()}
    return Variant(block, rates, kept_weights, masks)


def prune_scheme(network, scheme: Scheme) -> Iterator[Variant]:
    """Yield every variant of a scheme, one at a time."""
    for block, variants in scheme.items():
        for rates in variants:
            yield prune_block(network, block, rates)


@torch.no_grad()
def install(model: Model, variant: Variant) -> None:
    """Put a variant in the place of its block. Mutates ``model``: weights and masks.

    Raises:
        UserError: a weight's shape differs from the model's.
    """
    for name, weight in variant.weights.items():
        parameter = model.network.get_parameter(name)
        if parameter.shape != weight.shape:
            raise UserError(f"{name}: the variant's shape {tuple(weight.shape)} is not the model's "
                            f"{tuple(parameter.shape)}")
        parameter.copy_(weight)
        model.masks[name] = variant.masks[name]


def compose(model: Model, bank: Bank, configuration: Configuration) -> None:
    """Turn an original model into the one a configuration describes, out of a bank's variants. Mutates model.

    Raises:
        UserError: the bank lacks a variant, names all that are missing.
    """
    bank.check_serves(configuration)
    for key in required_variants(configuration).items():
        install(model, bank.read(key))


def from_files(model_path: Path, bank_path: Path, configurations: Path, n: int) -> tuple[Model, dict]:
    """Compose configuration ``n`` out of files.

    Returns:
        The model, and the inputs to name in its provenance.

    Raises:
        UserError: a file is bad, they do not belong together, or the bank lacks a variant.
    """
    configuration = nth(read_configurations(configurations), n, configurations)
    opened = load_bank(bank_path)
    model = load_model(model_path)
    opened.check_origin(model.identity, model_path)
    check_modules(configuration, prunable(model.network), configurations)
    inputs = {"model": (model_path, model.identity, model.provenance),
              "bank": (bank_path, opened.sha256, opened.provenance),
              "configurations": (configurations, digest(configurations.read_bytes()), {})}
    compose(model, opened, configuration)
    return model, inputs
