"""--plan tells from headers alone what a stage will take, and does nothing else."""

import re
import zipfile

import pytest

from common import plan
from common.pruning import bank
from common.pruning.scheme import read_scheme
from common.t5 import model as models
from common.t5.cost import Shape
from common.t5.header import read_header

COMMANDS = {"prune": ["-c", "scheme.json"], "block-level_finetuning": ["-p", "pruned.npy"],
            "model-level_finetuning": ["-p", "tuned.npy", "-c", "conf.json"], "baseline_finetuning": []}


def said(text: str) -> dict[str, float]:
    """Return {first word of a line: its first number}."""
    return {line.split()[0]: float(re.search(r"[\d.,]+(e[+-]\d+)?", line)[0].rstrip(",.").replace(",", ""))
            for line in text.splitlines()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_plan_is_printed_and_nothing_else_happens(made, stage, tmp_path, monkeypatch, name):
    """Also of a file whose weights are damaged, and where there is much too little memory."""
    content, damaged = (made / "origin.pth").read_bytes(), tmp_path / "origin.pth"
    with zipfile.ZipFile(made / "origin.pth") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    at = largest.header_offset + largest.file_size // 2
    damaged.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
    monkeypatch.setattr("common.runtime.available_memory", lambda *device: 1000)
    monkeypatch.chdir(made)
    before = sorted(made.iterdir())
    result = stage(name, "-m", damaged, *COMMANDS[name], "-o", tmp_path / "out", "--plan")
    assert (result.code, result.err) == (0, ""), result.err
    assert [line.split()[0] for line in result.out.splitlines()] == [
        "parameters", "variants", "disk", "memory", "operations"]
    network = models.load(made / "origin.pth").network
    assert said(result.out)["parameters"] == sum(p.numel() for p in network.parameters())
    assert sorted(made.iterdir()) == before and sorted(tmp_path.iterdir()) == [damaged]


def test_disk_and_variants_are_those_of_the_files(made):
    header = read_header(made / "origin.pth")
    keys = plan.variants_of(read_scheme(made / "scheme.json")[0])
    assert sorted(keys) == sorted(bank.load(made / "pruned.npy").entries)
    opened = bank.load(made / "pruned.npy")
    data = sum(entry["bytes"] for entry in opened.entries.values())
    for planned in (plan.prune(header, keys, False), plan.block_level(header, keys, "exact", 1, None)):
        assert planned["variants"] == len(keys) and planned["disk"] == pytest.approx(data, rel=0.05)


def test_what_is_pruned_takes_less(made):
    whole, pruned = (plan.training(read_header(made / name), [], 1024, 2, 100, False) for name in (
        "origin.pth", "pruned.pth"))
    assert all(pruned[key] < whole[key] for key in ("parameters", "disk", "memory", "operations"))
    taught = plan.training(read_header(made / "origin.pth"), [], 1024, 2, 100, True)
    assert taught["operations"] == pytest.approx(whole["operations"] * 4 / 3)


def test_operations_of_a_pair_by_hand(made):
    """Against a count of every matrix product that the network runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = models.load(made / "origin.pth").network
    ids = torch.ones(1, 7, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        network(*ids)
    assert Shape.of(network).operations(7, 5) == counted.get_total_flops()
