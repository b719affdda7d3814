"""Complete models out of a bank's variants."""

from pathlib import Path

import torch

from common.errors import UserError
from common.files.atomic import digest
from common.files.provenance import Input
from common.pruning.bank import Bank, Variant
from common.pruning.bank import load as load_bank
from common.pruning.configurations import Configuration, check_modules, nth, read_configurations, required_variants
from common.t5.model import Model
from common.t5.model import load as load_model
from common.t5.modules import prunable


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


def from_files(model_path: Path, bank_path: Path, configurations: Path, n: int) -> tuple[Model, Bank, dict[str, Input]]:
    """Compose configuration ``n`` out of files.

    Returns:
        The model, the bank, and the inputs to name in the model's provenance.

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
    return model, opened, inputs
