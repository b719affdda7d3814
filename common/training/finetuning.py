"""Train a complete model on the translation loss and write it: what baseline and model level share."""

from pathlib import Path

from torch import nn

from common.errors import UserError
from common.files.provenance import Input, hashes, provenance
from common.t5.loss import Teacher, TranslationLoss
from common.t5.model import Model, save
from common.text.batches import Batches
from common.training.loop import FitOptions, FitResult, finish, fit
from common.training.masks import Pruned

# Arguments that do not decide the result, or only when it is good enough.
_FREE = ("resume", "overwrite", "device", "target_loss")


def fingerprint(arguments: dict, inputs: dict[str, Input]) -> dict[str, str]:
    """Return what must be equal for a run to be resumed: arguments that decide the result, and hashes of its inputs."""
    return {k: str(v) for k, v in arguments.items() if k not in _FREE and not isinstance(v, Path)} | hashes(
        inputs)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the dropout of a T5's modules, not that of its configuration. Mutates it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def finetune(stage: str, arguments: dict, model: Model, inputs: dict[str, Input], train: Batches, valid: Batches,
             options: FitOptions, output: Path, device, teacher: Model | None = None, spent: float = 0.0) -> FitResult:
    """Train a complete model and write it.

    Args:
        stage: the script's name, for the provenance.
        arguments: of the stage, by name, for the provenance and for what --resume compares.
        model: its masks stay in force. Mutated.
        inputs: what it was made from; the text is added. Mutated.
        teacher: the model to distil from.
        spent: seconds that recalibration took, see `common.training.loop.fit`.

    Raises:
        UserError: of `fit`, or the teacher has another vocabulary.
    """
    if teacher:
        if not _same_vocabulary(teacher, model):
            raise UserError("the model to distil from has another vocabulary than the model to train; distilling needs "
                            "the same")
        teacher.network.to(device).eval().requires_grad_(False)
    inputs |= {"training text": train.as_input(), "validation text": valid.as_input()}
    with Pruned(model, device) as network:
        objective = TranslationLoss(network, teacher and Teacher(teacher.network))
        if options.dropout is not None:
            set_dropout(network, options.dropout)
        result = fit(objective, train, valid, options, device=device, fingerprint=fingerprint(arguments, inputs),
                     spent=spent)
    model.provenance = provenance(stage, arguments, inputs)
    save(output, model)
    finish(options)
    return result


def _same_vocabulary(a: Model, b: Model) -> bool:
    return a.network.config.vocab_size == b.network.config.vocab_size and \
        a.tokenizer.get_vocab() == b.tokenizer.get_vocab()
