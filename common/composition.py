"""Make variants out of an original model, and complete models out of variants."""

from collections.abc import Iterator
from pathlib import Path

import torch

from common import masking, reconstruction
from common.bank import Bank, Variant
from common.bank import load as load_bank
from common.configs import Configuration, Scheme, check_modules, nth, read_configurations, required_variants
from common.files import UserError, digest
from common.models import Model
from common.models import load as load_model
from common.modules import HEAD_PARTS, kind_of, prunable


def prune_block(network, block: str, variants: list[tuple[float, ...]], criterion: str = "l1",
                gram=None) -> Iterator[Variant]:
    """Yield a block's variants at the given rates; the network is not changed.

    A block whose head rate is 0 has only its out-projection in the variant.

    Args:
        variants: for each variant the rates of the block's members.
        criterion: ``l1`` (magnitude), ``wanda`` or ``obs`` for single weights; the latter two choose heads by the
            attention's output. See `common.masking`.
        gram: E[x xᵀ] of the block's input (for an attention, of its ``o``), for all criteria but l1.

    Raises:
        UserError: the head rate would remove every head, or the statistics defeat the criterion.
    """
    def weight(part=""):
        return network.get_parameter(f"{block}{part}.weight").detach()

    name = "" if kind_of(block) == "linear" else ".o"
    w, heads, masks = weight(name), {}, {}
    try:
        for head_rate in dict.fromkeys(rates[:-1] for rates in variants):  # () for a linear block
            there = torch.ones_like(w[0], dtype=torch.bool)
            if name and head_rate[0]:
                count = network.config.num_heads
                heads[head_rate] = (
                    masking.head_mask(masking.head_scores(*(weight(f".{part}") for part in HEAD_PARTS), count),
                                      head_rate[0]) if criterion == "l1"
                    else masking.head_mask_by_output(w, gram, count, head_rate[0]))
                there = heads[head_rate].repeat_interleave(len(there) // count)
            single = [rates[-1] for rates in variants if rates[:-1] == head_rate]
            if criterion == "obs":
                found = masking.obs_masks(w, single, gram, there)
            elif criterion == "wanda":
                found = [masking.wanda_mask(w, rate, gram, there) for rate in single]
            else:
                found = [masking.magnitude_mask(w, rate) for rate in single]
            masks |= {(*head_rate, rate): mask for rate, mask in zip(single, found, strict=True)}
        for rates in variants:
            chosen = {f"{block}{name}.weight": masks[rates]}
            if rates[:-1] in heads:
                parts = masking.attention_masks(heads[rates[:-1]], weight(".q"), masks[rates])
                chosen = {f"{block}.{part}.weight": mask for part, mask in parts.items()}
            weights = {n: torch.where(mask, network.get_parameter(n).detach(), 0.0) for n, mask in chosen.items()}
            yield Variant(block, rates, weights, chosen)
    except (UserError, ArithmeticError) as error:
        raise UserError(f"{block}: {error}") from None


def prune_scheme(network, scheme: Scheme) -> Iterator[Variant]:
    """Yield every variant of a scheme by l1 norm, one at a time."""
    for block, variants in scheme.items():
        yield from prune_block(network, block, variants)


def prune_scheme_by_activations(network, scheme: Scheme, criterion: str, calibration, device,
                                budget: int) -> Iterator[Variant]:
    """Yield every variant of a scheme by a criterion that needs the activations, one at a time."""
    blocks: dict[str, list[str]] = {}
    for block in scheme:
        blocks.setdefault(reconstruction.input_site(block), []).append(block)
    for site, moments in reconstruction.grouped(network, list(blocks), [calibration], device, budget):
        for block in blocks[site]:
            yield from prune_block(network, block, scheme[block], criterion, *moments)


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
