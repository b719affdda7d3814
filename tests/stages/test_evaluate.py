"""The scores, their JSON, their picture, and the ancestry of every file."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu

from common import plots
from common.t5 import model as models
from common.text.batches import source_text
from common.text.corpus import Corpus, read_pairs
from common.text.translation import translate
from tests.small import ROOT, load_stage

KEYS = ["model", "identity", "source", "target", "test_set", "num_beams", "max_new_tokens", "hit_limit",
        "validation_loss", "bleu", "bleu_signature", "chrf", "chrf_signature", "notes", "seconds",
        "tokens_per_second", "parameters", "zeros", "shrunk_parameters", "masked", "bytes", "examples"]


@pytest.fixture
def text(made, tmp_path):
    """A folder with four sentences a split, in English, German and Chinese."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("val", "test_2016_flickr", "other"):
        for language in ("en", "de"):
            lines = (made / "text" / f"{split.replace('other', 'val')}.{language}").read_text().splitlines()[:4]
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.zh").write_text("那只狗跑得很快。\n一个男人在吃。\n我们去公园。\n他看书。\n")
    return folder


@pytest.fixture
def run(text, tmp_path, stage):
    """Evaluate with the small text; returns the stage's result and the rows of the JSON."""
    def call(*arguments):
        out = tmp_path / "s.json"
        result = stage("evaluate", *arguments, "--data", text, "--json", out, "--overwrite")
        assert (result.code, result.err) == (0, "")
        return result, json.loads(out.read_text())
    return call


def variant(made, path: Path, **changes) -> Path:
    """Write the small model with other languages or another prefix."""
    models.save(path, replace(models.load(made / "origin.pth"), **changes))
    return path


def test_the_report_says_what_sacrebleu_says(made, run, text):
    result, rows = run("-m", made / "origin.pth", made / "pruned.pth", "--lowercase")
    model = models.load(made / "origin.pth")
    pairs = read_pairs(Corpus(text, "en", "de"), "test_2016_flickr")
    texts, references = translate(model, source_text(pairs, model), "cpu").texts, [t for _, t in pairs]
    assert [list(r) for r in rows] == [KEYS, KEYS] and rows[0]["identity"] == model.identity
    assert rows[0]["bleu"] == sacrebleu.corpus_bleu(texts, [references], lowercase=True).score
    assert rows[0]["chrf"] == sacrebleu.metrics.CHRF(lowercase=True).corpus_score(texts, [references]).score
    assert [(e["source"], e["reference"], e["translation"]) for e in rows[0]["examples"]] == [
        (*pair, t) for pair, t in zip(pairs[:3], texts[:3], strict=True)]
    assert "case:lc" in rows[0]["bleu_signature"] and result.out.count("case:lc|eff:no|tok:13a") == 1
    assert rows[0]["bytes"] == (made / "origin.pth").stat().st_size
    assert (rows[0]["zeros"], rows[0]["masked"], rows[1]["masked"]) == (0, False, True) and rows[1]["zeros"] > 0
    assert rows[0]["shrunk_parameters"] == rows[0]["parameters"] == rows[1]["parameters"]
    assert rows[1]["shrunk_parameters"] < rows[1]["parameters"] and f"{rows[1]['shrunk_parameters']:,}" in result.out


def test_the_limit_of_new_tokens_is_told(made, run, monkeypatch):
    from common.text import translation

    monkeypatch.setattr(translation, "limit", lambda batch: 2)
    result, (row,) = run("-m", made / "origin.pth")
    assert row["max_new_tokens"] == "2 x source + 16"
    assert row["hit_limit"] > 0 and f"{row['hit_limit']:.1%} cut at the limit of new tokens\n" in result.out


def test_a_limit_that_nothing_hits_is_not_in_the_table(made, run, monkeypatch):
    from common.text import translation

    monkeypatch.setattr(translation, "translate", lambda *a: translation.Translations(["a b c d"] * 4, 2.0, 0.0, 48))
    result, (row,) = run("-m", made / "origin.pth")
    assert row["hit_limit"] == 0 and result.out.splitlines()[1].endswith("  24")


def test_each_model_is_scored_by_its_own_languages(made, run, tmp_path):
    chinese = variant(made, tmp_path / "zh.pth", target="zh")
    result, rows = run("-m", made / "origin.pth", chinese)
    assert [(r["source"], r["target"]) for r in rows] == [("en", "de"), ("en", "zh")]
    assert ["tok:13a|" in rows[0]["bleu_signature"], "tok:zh|" in rows[1]["bleu_signature"]] == [True, True]
    assert all(s in result.out for s in ("tok:13a|", "tok:zh|", "\nzh   那只狗跑得很快。\n", "\nde   "))
    assert rows[1]["examples"][0]["reference"] == "那只狗跑得很快。"


def test_perfect_chinese_scores_100(made, run, tmp_path, monkeypatch):
    from common.text import translation

    chinese = variant(made, tmp_path / "zh.pth", target="zh_CN")
    for split in ("val", "test_2016_flickr"):
        shutil.copy(tmp_path / "text" / f"{split}.zh", tmp_path / "text" / f"{split}.zh_CN")
    perfect = (tmp_path / "text" / "val.zh").read_text().splitlines()
    monkeypatch.setattr(translation, "translate", lambda *a: translation.Translations(perfect, 1.0, 0.0, 1))
    assert run("-m", chinese)[1][0]["bleu"] == pytest.approx(100)


def test_notes_are_printed_once(made, run, tmp_path, monkeypatch):
    from common.text import translation

    monkeypatch.setattr(translation, "translate", lambda *a: translation.Translations(["Ja"] * 4, 1.0, 0.0, 1))
    result, rows = run("-m", made / "origin.pth", made / "pruned.pth")
    assert result.out.count("note: no translation into de is 4 words long") == 1 and len(rows[1]["notes"]) == 1


def test_another_test_set_is_read(made, run, text):
    _, (row,) = run("-m", made / "origin.pth", "--test-set", "other")
    assert row["test_set"] == "other"
    assert row["examples"][0]["source"] == (text / "other.en").read_text().splitlines()[0]


@pytest.mark.parametrize(("model", "terminal"), [
    ("größe.pth", {"PYTHONIOENCODING": "ascii"}),
    ("model.pth", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})])
def test_a_terminal_that_lacks_characters_ends_nothing(made, text, tmp_path, model, terminal):
    shutil.copy(made / "origin.pth", tmp_path / model)
    (text / "test_2016_flickr.en").write_text("Zoë – 犬\n" * 4, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "-m", model, "--data", text, "--json", "ö.json", "--plot", "ö.svg"],
        env=os.environ | terminal, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Zo\\xeb \\u2013 \\u72ac" in done.stdout
    row, = json.loads((tmp_path / "ö.json").read_text(encoding="utf-8"))
    assert row["model"] == model and row["examples"][0]["source"] == "Zoë – 犬"
    assert model.removesuffix(".pth") in (tmp_path / "ö.svg").read_text(encoding="utf-8")


def test_the_results_are_written_before_examples_are_shown(made, text, tmp_path, monkeypatch):
    def fail(rows):
        raise RuntimeError("shown too early")

    script = load_stage("evaluate")
    monkeypatch.setattr(script, "show_examples", fail)
    with pytest.raises(RuntimeError, match="shown too early"):
        script.main(["-m", str(made / "origin.pth"), "--data", str(text), "--json", str(tmp_path / "s.json"),
                     "--plot", str(tmp_path / "s.png")])
    assert len(json.loads((tmp_path / "s.json").read_text())) == 1 and (tmp_path / "s.png").exists()


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--plot", "s.jpg"], "s.jpg: the picture's name must end in .png, .pdf or .svg"),
    (["--json", "there.json"], "there.json: exists already; choose another name or add --overwrite"),
    (["--plot", "there.png"], "there.png: exists already; choose another name or add --overwrite"),
    (["--plot", "a.png", "--json", "a.png"], "two outputs have the same name: a.png, a.png"),
    (["--device", "warp"], "--device warp: cannot be used: "),
    (["--data", "nowhere"], "nowhere/test_2016_flickr.en: is not there, nor with .gz; --data names a folder"),
    (["--data", "{made}/text", "--test-set", "none"], "none.en: is not there, nor with .gz; --data names a folder")])
def test_errors(made, tmp_path, monkeypatch, stage, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    for name in ("there.json", "there.png"):
        (tmp_path / name).write_text("mine")
    result = stage("evaluate", "-m", made / "origin.pth", *[a.format(made=made) for a in arguments])
    assert result.code == 2 and complaint in result.err and result.err.startswith("evaluate.py: error: ")
    assert (tmp_path / "there.json").read_text() == (tmp_path / "there.png").read_text() == "mine"


def test_every_missing_model_is_named(tmp_path, stage):
    result = stage("evaluate", "-m", tmp_path / "a.pth", tmp_path / "b.pth")
    assert (result.code, result.err) == (
        2, f"evaluate.py: error: {tmp_path}/a.pth: no such file; {tmp_path}/b.pth: no such file\n")


def test_it_has_these_flags_only_and_a_help_of_one_screen(stage):
    parser = load_stage("evaluate").build_parser()
    assert [a.option_strings[-1].replace("--data-dir", "--data") for a in parser._actions][1:] == [
        "--model", "--test-set", "--num-beams", "--lowercase", "--ancestry", "--json", "--plot", "--overwrite",
        "--data", "--device"]
    assert len(parser.format_help().splitlines()) <= 50


def test_ancestry_tells_every_stage_and_does_nothing_else(made, tmp_path, stage):
    result = stage("evaluate", "-m", made / "pruned.pth", made / "tuned.npy", made / "scheme.json", made / "conf.json",
                   "--ancestry", "--json", tmp_path / "s.json", "--data", "nowhere")
    assert (result.code, result.err) == (0, "") and not (tmp_path / "s.json").exists()
    for name in ("prune.py", "prune_scheme_generator.py", "download_model.py", "block-level_finetuning.py"):
        assert f"made by {name}: " in result.out
    assert models.load(made / "origin.pth").identity in result.out
    assert "conf.json (sha256 " in result.out and "\n  2 configurations, free to be edited\n" in result.out


@pytest.mark.parametrize("name", ["origin.pth", "tuned.npy", "scheme.json", "conf.json"])
def test_ancestry_of_a_broken_file_is_refused(work, stage, name):
    (work / name).write_bytes((work / name).read_bytes()[:-40])
    result = stage("evaluate", "-m", work / name, "--ancestry")
    assert result.code == 2 and result.err.startswith(f"evaluate.py: error: {work / name}: ")


@pytest.mark.parametrize(("names", "expected"), [
    ("pruned_0.pth pruned_1.pth origin_model.pth", "pruned pruned origin_model"),
    ("composed_0.pth pruned_0.pth", "composed_0 pruned_0"),  # alone they keep their names
    ("a_0_v2.pth a_1_v2.pth b_1_v2.pth", "a_v2 a_v2 b_1_v2"),
    ("s1_a_0.pth s1_a_1.pth s2_a_0.pth s2_a_1.pth", "s1_a s1_a s2_a s2_a"),
    ("runs/1/final.pth runs/2/final.pth", "final final"),
    ("x/c_0.pth x/c_1.pth y/c_0.pth y/c_1.pth", "x/c x/c y/c y/c"),
    ("x/c.pth y/c.pth", "x/c y/c"), ("at0.5.pth at0.75.pth at1.pth", "at at at"), ("0.pth 1.pth", "model model"),
    ("c_0.pth c_0.pth", "c c"), ("_m.pth", "_m")])
def test_models_whose_names_differ_in_one_number_are_an_arm(names, expected):
    assert load_stage("evaluate").arms(names.split()) == expected.split()


def row(name, zeros, bleu, masked=True, **more) -> dict:
    return {"model": name, "parameters": 1_000_000, "zeros": zeros, "bleu": bleu, "masked": masked, "source": "en",
            "target": "de", "test_set": "test_2016_flickr"} | more


def test_the_picture_joins_arms_and_marks_what_is_dense(tmp_path, monkeypatch):
    seen, legend = [], plots.legend
    monkeypatch.setattr(plots, "legend", lambda *a: seen.extend(a) or legend(*a))
    load_stage("evaluate").draw(tmp_path / "a.svg", [
        row("_c_1.pth", 800_000, 20.0), row("_c_0.pth", 500_000, 25.0), row("$o$1.pth", 9, 30.0, masked=False),
        row("foreign.pth", 600_000, 22.0, masked=False), row("$o$2.pth", 0, 29.0, masked=False)])
    axes, lines, names = seen
    assert names == [r"\$o\$ (dense)", "_c", "foreign"]
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == [
        [(0.999991, 30.0), (1.0, 29.0)], [(0.2, 20.0), (0.5, 25.0)], [(0.4, 22.0)]]
    assert [line.get_marker() == "*" for line in lines] == [True, False, False]
    assert [line.get_linestyle() for line in lines] == ["None", "-", "None"]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [[30.0, 30.0], [29.0, 29.0]]
    assert axes.get_title() == "test_2016_flickr, en to de" and axes.get_ylabel() == "BLEU"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == names


@pytest.mark.parametrize("name", ["_m.pth", "$x$.pth", "a$.pth", "m.pth", "$", "x" * 200])
def test_any_name_is_drawn_without_a_warning(tmp_path, name, recwarn, capsys):
    load_stage("evaluate").draw(tmp_path / "a.png", [row(name, 0, 0.0, False), row(f"b{name}", 0, 0.0, False)])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not recwarn.list and capsys.readouterr().err == ""


def test_a_picture_of_several_languages_names_them_all(tmp_path, capsys):
    load_stage("evaluate").draw(tmp_path / "a.svg", [row("日.pth", 0, 1.0), row("b.pth", 0, 2.0, target="zh")])
    assert "<!-- test_2016_flickr, en to de, en to zh -->" in (tmp_path / "a.svg").read_text()
    assert capsys.readouterr().err == (f"{tmp_path / 'a.svg'}: the font lacks some characters of the names; they are "
                                       "drawn as boxes\n")
