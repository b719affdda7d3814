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
    (["--sparsity", "0.5"], "a search needs a bank (-p) and --sparsity, --target-loss or --speedup"),
    (["-p", "tuned.npy"], "a search needs a bank (-p) and --sparsity, --target-loss or --speedup"),
    (["--speedup", "2"], "a search needs a bank (-p)"),
    *[(["--speedup", x], f"'{x}' is not a number of at least 1") for x in ("0.9", "nan", "inf")],
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


@pytest.fixture
def slow_attentions(monkeypatch):
    """Times that are not measured: of 4 heads each takes 1 s, and all else 6 s, so that the small model takes 30 s."""
    from common.pruning import latency

    def measure(model, text, device):
        table = {name: {0: 0.0, 48: 0.0} if "feed" in name else {0: 0.0, 1: 1.0, 4: 4.0}
                 for name in latency.KINDS.values()}
        return latency.Latency(6.0, table, latency.conditions(device))

    monkeypatch.setattr(latency, "measure", measure)
    return latency


def test_a_search_for_speed_times_the_machine_once(work, stage, monkeypatch, slow_attentions):
    monkeypatch.chdir(work)
    arguments = ["config_generator", "-m", "origin.pth", "-p", "tuned.npy", "-o", "fast.json", "--data", "text",
                 "--overwrite"]
    first = stage(*arguments, "--speedup", 1.1, 1.4, "--sparsity", 0.2)
    assert first.code == 0 and "tuned.latency.json: times of 40 translations" in first.out
    assert "configuration 0: for sparsity 0.2: sparsity 0." in first.out
    made = json.loads((work / "fast.json").read_text())
    for configuration, speedup in zip(made[1:], (1.1, 1.4), strict=True):
        removed = sum(4 * rate for name, rate in configuration.items() if name.endswith("Attention"))
        assert f"for speed-up {speedup}: predicted {30 / (30 - removed):.2f} times as fast, expected loss " in first.out
        assert 30 / (30 - removed) >= speedup
    measured = (work / "tuned.latency.json").read_bytes()
    monkeypatch.setattr(slow_attentions, "measure", None)
    assert stage(*arguments, "--speedup", 1.3).code == 0
    refused(stage(*arguments, "--speedup", 9), "tuned.npy: no combination of its variants has speed-up 9; they reach",
            "to predicted 1.67 times as fast, expected loss ",  # half of the heads
            "; variants at rate 1, which skip a sub-layer, would save more")
    assert (work / "tuned.latency.json").read_bytes() == measured


def test_times_of_other_threads_are_measured_anew_and_those_of_another_model_refused(work, stage, monkeypatch,
                                                                                     slow_attentions):
    from dataclasses import replace

    from common.t5 import model
    from common.text.corpus import Corpus

    monkeypatch.chdir(work)
    arguments = ["config_generator", "-m", "origin.pth", "-p", "tuned.npy", "-o", "fast.json", "--data", "text",
                 "--overwrite", "--speedup", 1.1]
    assert stage(*arguments).code == 0
    origin = model.load(work / "origin.pth")
    text = slow_attentions.text_of(Corpus(work / "text", "en", "de"), origin)
    of = {"model": origin.identity, "validation text": text.sha256}
    path = work / "tuned.latency.json"
    found = slow_attentions.read(path, of)
    slow_attentions.write(path, replace(found, measured_on=found.measured_on | {"threads": 99}), of)
    again = stage(*arguments)
    assert again.code == 0 and "was measured otherwise, so it is measured anew: threads 99, now " in again.out
    assert slow_attentions.read(path, of) == found
    slow_attentions.write(path, found, of | {"model": "0" * 64})
    refused(stage(*arguments), "tuned.latency.json: was measured on something else; remove it and it is measured anew",
            "model: '000")


def test_a_bank_of_scattered_zeros_has_no_speed(work, stage, monkeypatch, slow_attentions):
    monkeypatch.chdir(work)
    for arguments in (["config_generator", "-m", "origin.pth", "-o", "c.json", "--attention", 0, "--linear", 0.5],
                      ["prune_scheme_generator", "-i", "c.json", "-o", "s.json"],
                      ["prune", "-m", "origin.pth", "-c", "s.json", "-o", "b.npy", "-p", "p.pth"]):
        assert stage(*arguments).code == 0
    refused(stage("config_generator", "-m", "origin.pth", "-p", "b.npy", "-o", "fast.json", "--speedup", 1.5, "--data",
                  "text"), "b.npy: its variants leave out single weights, which saves no time",
            "config_generator.py --attention 0.25 0.5 0.75 1 1 --feed-forward 0.25 0.5 0.75 0.9 1")
