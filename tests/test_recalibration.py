import pytest
import torch

from common import bank, composition, models, recalibration, training
from common.configs import read_configurations
from common.recalibration import recalibrate
from common.reconstruction import run_stacks


def quiet(text):
    pass


def composed(made, n=1, name="tuned.npy"):
    model = models.load(made / "origin.pth")
    composition.compose(model, bank.load(made / name), read_configurations(made / "conf.json")[n])
    return model


def states_error(made, model, batches):
    """Mean squared difference of the two models' decoder states, the plain way."""
    original, total, count = models.load(made / "origin.pth").network, 0.0, 0
    with torch.no_grad():
        for batch in batches.fixed():
            valid = batch["labels"] >= 0
            difference = (run_stacks(original, batch) - run_stacks(model.network, batch))[valid]
            total, count = total + float(difference.square().sum()), count + int(valid.sum())
    return total / count


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_recalibrating_the_original_changes_nothing(tmp_path, made, text, kind):
    """The sweep carries both models' states through every layer itself: for equal models the fit is the identity."""
    from tests.conftest import make_tokenizer, save_folder

    network = save_folder(tmp_path / kind, kind)
    model = models.Model(network, make_tokenizer().to_str())
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    other = save_folder(tmp_path / f"{kind}2", kind)
    recalibrate(other, model, text[1], "cpu", 1e-4, log=quiet)
    for name, p in model.network.named_parameters():
        assert torch.allclose(p, before[name], atol=1e-4), name


def test_it_brings_the_composed_model_nearer_and_keeps_masks(made, text):
    model = composed(made)
    before = states_error(made, model, text[1])
    recalibrate(models.load(made / "origin.pth").network, model, text[0], "cpu", 1e-4, log=quiet)
    assert states_error(made, model, text[1]) < 0.9 * before
    for name, mask in model.masks.items():
        assert not model.network.get_parameter(name)[~mask].any()


def test_the_first_layers_fit_equals_plain_least_squares(made, text):
    """Encoder layer 0: o on the inputs it receives after q, k, v, whose own inputs have not shifted."""
    model = composed(made)
    original = models.load(made / "origin.pth").network
    recalibrate(original, model, text[1], "cpu", 1e-9, log=quiet)
    name = "encoder.block.0.layer.0.SelfAttention"
    seen = {}
    for key, network in (("original", original), ("composed", model.network)):
        rows = []
        attention = network.get_submodule(name)
        hooks = [attention.o.register_forward_hook(lambda m, i, o, rows=rows: rows.append((i[0], o)))]
        with torch.no_grad():
            for batch in text[1].fixed():
                network.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                valid = batch["attention_mask"].bool()
                rows[-1] = tuple(x[valid].double() for x in rows[-1])
        for hook in hooks:
            hook.remove()
        seen[key] = [torch.cat(x) for x in zip(*rows, strict=True)]
    x, target = seen["composed"][0], seen["original"][1]
    mask = model.masks[f"{name}.o.weight"]
    for row in range(4):
        best = torch.linalg.lstsq(x[:, mask[row]], target[:, row, None]).solution[:, 0]
        mine = model.network.get_parameter(f"{name}.o.weight").detach()[row, mask[row]].double()
        residuals = [float((target[:, row] - x[:, mask[row]] @ w).square().sum()) for w in (mine, best)]
        assert residuals[0] == pytest.approx(residuals[1], rel=1e-3)


@pytest.mark.parametrize(("name", "extra"), [
    ("compose_model", []), ("model-level_finetuning", ["--epochs", 1, "--lr", 1e-9])])
def test_the_stages_recalibrate(made, tmp_path, stage, name, extra):
    common = ["-m", made / "origin.pth", "-p", made / "tuned.npy", "-c", made / "conf.json", "-n", 1,
              "--data-dir", made / "text", *extra]
    stats = [] if name == "compose_model" else ["--stats", tmp_path / "s.csv"]
    result = stage(name, *common, *stats, "--recalibrate", "-o", tmp_path / "r.pth")
    assert result.code == 0 and "recalibrated on 200 sentence pairs" in result.err
    made_again, plain = models.load(tmp_path / "r.pth"), composed(made)
    assert made_again.masks.keys() == plain.masks.keys()
    weight = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    assert not torch.equal(made_again.network.get_parameter(weight), plain.network.get_parameter(weight))


def test_a_layer_whose_fit_fails_is_named(made, text, monkeypatch):
    def fail(*args, **kwargs):
        raise ArithmeticError("no")

    monkeypatch.setattr(recalibration, "solve", fail)
    with pytest.raises(training.UserError, match="encoder.block.0.layer.0.SelfAttention.q: no; a larger --damping"):
        recalibrate(models.load(made / "origin.pth").network, composed(made), text[1], "cpu", 1e-4, log=quiet)
