import csv
import os
from pathlib import Path

import numpy as np
import pytest

from common.pruning import bank
from tests.small import ROOT, arguments, refused

REAL_DATA = Path(os.environ.get("MULTI30K_DIR", ROOT / "data" / "multi30k")).absolute()
REAL_TEACHER = Path(os.environ.get("TEACHER_DIR", ROOT / "data" / "teacher")).absolute()


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_exact_solver_writes_a_row_before_and_after_and_a_table_of_variants(made):
    before, after = read_csv(made / "block.csv")
    table = read_csv(made / "block.variants.csv")
    assert (before["epoch"], after["epoch"]) == ("0", "1")
    assert [(row["block"], row["rates"]) for row in table] == [
        (block, " ".join(f"{rate:g}" for rate in rates)) for block, rates in bank.load(made / "tuned.npy").entries]
    for row, column in ((before, "valid_error_before"), (after, "valid_error_after")):
        assert float(row["valid_loss"]) == pytest.approx(np.mean([float(r[column]) for r in table]), rel=1e-6)
    assert float(after["valid_loss"]) < 0.5 * float(before["valid_loss"])


@pytest.mark.parametrize(("solver", "more"), [("adamw", []), ("joint", ["-c", "conf.json"])])
def test_the_other_solvers_lower_the_loss_inside_the_masks(work, stage, monkeypatch, solver, more):
    monkeypatch.chdir(work)
    given = "pruned.npy" if solver == "adamw" else "tuned.npy"
    result = stage(*arguments("block-level_finetuning", "--solver", solver, "--epochs", "2", "--lr", "3e-3", "--stats",
                              "s.csv", *more, bank=given))
    assert result.code == 0, result.err
    rows, before, after = read_csv(work / "s.csv"), bank.load(work / given), bank.load(work / "out.npy")
    assert len(rows) == 3 and float(rows[-1]["valid_loss"]) < float(rows[0]["valid_loss"])
    assert after.tuned == solver and ("configurations" in after.provenance["inputs"]) == bool(more)
    assert list(after.entries) == list(before.entries)
    for key in after.entries:
        old, new = before.read(key), after.read(key)
        assert all((old.masks[name] == new.masks[name]).all() for name in old.masks)


@pytest.mark.parametrize(("flags", "message"), [
    (["-c", "conf.json"], "-c says what --solver joint draws"), (["--resume"], "the exact solver keeps no checkpoint"),
    (["--stats", "."], ".: is a folder, a file name is needed")])
def test_flags_that_do_not_fit_are_refused(work, stage, monkeypatch, flags, message):
    monkeypatch.chdir(work)
    refused(stage(*arguments("block-level_finetuning", *flags)), message)


@pytest.mark.skipif(not (REAL_DATA.is_dir() and REAL_TEACHER.is_dir()), reason=(
    "needs MULTI30K_DIR (Multi30K) and TEACHER_DIR (a T5 of 2.02 M parameters trained on it)"))
def test_on_multi30k_exact_tuning_recovers_most_of_the_loss(tmp_path, stage, monkeypatch):
    """At 25 % of heads and 50 % of weights the validation loss was 2.217 masked (2026-11)."""
    from common.pruning.composition import from_files
    from common.t5.loss import TranslationLoss, evaluate
    from common.text.batches import validation_text
    from common.text.corpus import Corpus

    monkeypatch.chdir(tmp_path)
    for command in (["download_model", "-m", REAL_TEACHER], ["config_generator", "-n", 1], ["prune_scheme_generator"],
                    ["prune"], ["block-level_finetuning", "--data", REAL_DATA]):
        assert stage(*command).code == 0
    losses = []
    for name in ("pruned_modules.npy", "finetuned_modules.npy"):
        model, *_ = from_files(*(tmp_path / n for n in ("origin_model.pth", name, "conf.json")), 0)
        valid = validation_text(Corpus(REAL_DATA, "en", "de"), model)
        losses.append(evaluate(TranslationLoss(model.network), valid, "cpu"))
    assert losses[0] == pytest.approx(2.217, abs=0.01) and losses[1] < 2.075
