import csv

import numpy as np
import pytest

from common.pruning import bank
from tests.small import arguments, refused


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
