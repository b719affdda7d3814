"""An export is checked, whole or not there, and says what it is."""

import stat

import pytest
import torch

from common.export import folder as export
from common.files.archive import load_sealed
from common.t5 import model as models
from common.text.batches import Batches
from common.text.translation import translate
from tests.small import demo_pairs, refused

SHORT = 8  # sentences that the check translates here


@pytest.fixture
def run(made, tmp_path, stage, monkeypatch):
    """Export the small pruned model to ``out``."""
    from tests import small

    load = small.load_stage
    monkeypatch.chdir(tmp_path)

    def short(name):
        module = load(name)
        monkeypatch.setattr(module, "SENTENCES", SHORT)
        return module

    monkeypatch.setattr("tests.conftest.load_stage", short)

    def call(*arguments, model="pruned.pth"):
        return stage("export_model", "-m", made / model, "-o", "out", *arguments)
    return call


def only(tmp_path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock"))


def test_an_export_translates_as_the_model_does(run, made, tmp_path):
    result = run()
    assert (result.code, result.err) == (0, "")
    assert f"0 of {SHORT} translations differ from those of {made / 'pruned.pth'} (greedy search)" in result.out
    model, pairs = models.load(made / "pruned.pth"), demo_pairs("val")[:SHORT]
    assert export.translations(tmp_path / "out", model, "hf", [s for s, _ in pairs], "cpu") == translate(
        model, Batches(pairs, model), "cpu", max_new_tokens=export.CHECK_TOKENS).texts
    assert only(tmp_path) == ["out"] and only(tmp_path / "out") == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o644}


def test_the_card_tells_how_it_was_made(run, tmp_path):
    assert run().code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made by export_model.py: " in card and "made by prune.py: " in card and "made by download_model.py" in card


def test_filling_is_told_and_a_dense_model_noted(run, tmp_path):
    result = run()
    assert "UMT5ForConditionalGeneration, float32, " in result.out and " of the weights are filling" in result.out
    (tmp_path / "out").rename(tmp_path / "other")
    result = run(model="origin.pth")
    assert "T5ForConditionalGeneration" in result.out and "filling" not in result.out and result.code == 0
    assert "note: the model has no empty head, unit or sub-layer, so nothing could be left out\n" in result.out


def test_ctranslate2(run, tmp_path):
    pytest.importorskip("ctranslate2")
    result = run("--format", "ctranslate2")
    assert (result.code, result.err) == (0, "") and "T5 for CTranslate2, float32, " in result.out
    assert only(tmp_path / "out") == ["README.md", "config.json", "model.bin", "shared_vocabulary.json",
                                      "tokenizer.json"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_file_is_a_model_file_of_half_the_size(run, made, tmp_path, dtype):
    result = run("--format", "pth", "--dtype", dtype)
    assert (result.code, result.err) == (0, "")
    assert f"out: {dtype}, " in result.out and f" of {SHORT} translations differ from those of " in result.out
    assert only(tmp_path) == ["out"]
    whole, half = models.load(made / "pruned.pth"), models.load(tmp_path / "out")
    for p, q in zip(whole.network.parameters(), half.network.parameters(), strict=True):
        assert torch.equal(q, p.to(getattr(torch, dtype)).float())
    assert half.provenance["inputs"]["model"]["sha256"] == whole.identity != half.identity
    weights, half_weights = (sum(t.nbytes for t in load_sealed(path, "a model file")["weights"].values())
                             for path in (made / "pruned.pth", tmp_path / "out"))
    assert 2 * half_weights == weights
    before = (tmp_path / "out").read_bytes()
    refused(run("--format", "pth"), "out: exists already")
    assert (tmp_path / "out").read_bytes() == before


def test_a_half_file_of_a_model_with_a_weight_beyond_float16_is_not_made(run, made, tmp_path):
    large = models.load(made / "pruned.pth")
    large.network.shared.weight.detach()[3, 3] = 1e5
    models.save(tmp_path / "m.pth", large)
    refused(run("-m", tmp_path / "m.pth", "--format", "pth", "--dtype", "float16"),
            "shared.weight has a weight of 100000; the largest that float16 holds is 65504")
    assert only(tmp_path) == ["m.pth"]


def test_a_half_file_that_translates_otherwise_is_not_made(run, tmp_path, monkeypatch):
    real = models.rounded

    def wrong(model, dtype):
        made = real(model, dtype)
        made.network.shared.weight.detach().copy_(made.network.shared.weight.flip(0))
        return made

    monkeypatch.setattr(models, "rounded", wrong)
    refused(run("--format", "pth", "--dtype", "bfloat16"), "out: is not made, because ", "choose another --dtype")
    assert only(tmp_path) == []


def test_the_text_can_be_chosen(run, made):
    assert run("--data", made / "text").code == 0
    refused(run("--data", "nowhere"), "out: exists already")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--dtype", "int8"], "--dtype int8: with --format hf it is float32, float16, bfloat16"),
    (["--dtype", "int8", "--format", "pth"], "--dtype int8: with --format pth it is float32, float16, bfloat16"),
    (["--quantization", "x", "--format", "ctranslate2"], "--dtype x: with --format ctranslate2 it is float32, "),
    (["--format", "onnx"], "--format: invalid choice: 'onnx'"), (["--device", "warp"], "--device warp: cannot be used"),
    (["--data", "nowhere"], "nowhere/val.en: is not there"), (["-m", "none.pth"], "none.pth: no such file"),
    (["-o", "a/b"], "a: is not a folder")])
def test_bad_input_leaves_nothing(run, tmp_path, arguments, message):
    (tmp_path / "a").write_text("")
    refused(run(*arguments), message)
    assert only(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_refused_and_untouched(run, tmp_path, kind):
    if kind == "folder":
        (tmp_path / "out").mkdir()
    elif kind == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").symlink_to("nowhere")
    refused(run(), "out: exists already; choose another name, or remove it first")
    assert only(tmp_path) == ["out"] and (kind != "folder" or not list((tmp_path / "out").iterdir()))


@pytest.mark.parametrize(("dtype", "wrong", "advice"), [
    ("float32", 1, "please report it"), ("bfloat16", 7, "choose another --dtype")])
def test_an_export_that_translates_otherwise_is_not_made(run, tmp_path, monkeypatch, dtype, wrong, advice):
    real = export.translations
    monkeypatch.setattr(export, "translations", lambda *a: [
        "wrong" if i < wrong else text for i, text in enumerate(real(*a))])
    result = run("--dtype", dtype)
    refused(result, f"export_model.py: error: out: is not made, because {wrong}" if dtype == "float32" else
            "out: is not made, because ", advice)
    assert only(tmp_path) == []


def test_a_missing_runtime_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ctranslate2", None)
    refused(run("--format", "ctranslate2"), "the package ctranslate2 is not installed; run pip install")
    assert only(tmp_path) == []


def test_a_model_of_other_languages_is_compared_on_the_demo_text(run, made, tmp_path):
    from dataclasses import replace

    models.save(tmp_path / "m.pth", replace(models.load(made / "pruned.pth"), source="fr", target="zh"))
    assert run("-m", tmp_path / "m.pth").code == 0
    assert "language: [fr, zh]" in (tmp_path / "out" / "README.md").read_text()
