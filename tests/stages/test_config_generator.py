import json

import pytest

from common.t5.modules import prunable
from tests.small import refused


@pytest.mark.parametrize(("arguments", "message"), [
    (["--attention", "0.5", "--linear", "0.5", "0.8"], "--linear lists 2 rates for 1 configurations"),
    (["--attention", "0.5", "-n", "2"], "--attention lists 1 rates for 2 configurations"),
    *[(["--linear", x], f"'{x}' is not a pruning rate in [0, 1)") for x in ("1", "-0.1", "nan", "half")],
    (["--attention", "0.9", "--linear", "0.5"], "pruning rate 0.9 removes all 4 heads"),
    (["-n", "0"], "'0' is not a whole number of at least 1"),
    (["--sparsity", "0.5"], "a search needs a bank (-p) and --sparsity or --target-loss"),
    (["-p", "tuned.npy"], "a search needs a bank (-p) and --sparsity or --target-loss"),
    (["-p", "tuned.npy", "--sparsity", "0.5", "-n", "1"], "name configurations; a search finds them"),
    (["-p", "tuned.npy", "--sparsity", "0.99", "--data", "text"], "tuned.npy: no combination of its variants has "
                                                                  "sparsity 0.99; they reach from sparsity")])
def test_what_it_cannot_do_is_refused(work, stage, monkeypatch, arguments, message):
    monkeypatch.chdir(work)
    refused(stage("config_generator", "-m", "origin.pth", "-o", "new.json", *arguments), message)
    assert not (work / "new.json").exists()


def test_rates_are_spread_between_mild_and_harsh(made, origin, tmp_path, stage):
    assert stage("config_generator", "-m", made / "origin.pth", "-o", tmp_path / "c.json").code == 0
    configurations, kinds = json.loads((tmp_path / "c.json").read_text()), prunable(origin.network)
    assert [{kinds[name]: rate for name, rate in c.items() if rate} for c in configurations] == [
        {"attention": a, "linear": b} for a, b in ((0.25, 0.5), (0.375, 0.65), (0.5, 0.8))]


def test_a_search_measures_once_whatever_outputs_are_there(work, stage, monkeypatch):
    """--overwrite replaces the output; the measurement beside the bank, which may be missing, is never replaced."""
    from common.pruning import search

    monkeypatch.chdir(work)
    arguments = ["config_generator", "-m", "origin.pth", "-p", "tuned.npy", "-o", "best.json", "--data", "text"]
    (work / "best.json").write_text("old")
    refused(stage(*arguments, "--sparsity", 0.3), "best.json: exists already")
    assert stage(*arguments, "--sparsity", 0.3, "--overwrite").code == 0
    assert len(json.loads((work / "best.json").read_text())) == 1
    measured = (work / "tuned.sensitivity.json").read_bytes()
    monkeypatch.setattr(search, "measure", None)
    assert stage(*arguments, "--sparsity", 0.2, 0.4, "--overwrite").code == 0
    assert len(json.loads((work / "best.json").read_text())) == 2
    assert (work / "tuned.sensitivity.json").read_bytes() == measured
