"""--plan tells from headers alone what a stage will take, and does nothing else."""

import re
import zipfile

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import plan
from common.pruning import bank
from common.pruning.configurations import read_configurations
from common.pruning.scheme import read_scheme
from common.t5 import model as models
from common.t5.cost import Shape
from common.t5.header import read_header
from common.t5.shrink import shrunk, used
from tests.small import save_folder

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
    if name != "model-level_finetuning":  # which says those of the composed model
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


def counted(network) -> int:
    """Return the operations of a pair of `plan.TOKENS` tokens each, counted."""
    ids = torch.ones(1, plan.TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(ids, ids)
    return counter.get_total_flops()


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("configuration", [0, 1])
def test_a_trainings_plan_is_that_of_the_network_it_trains(made, stage, tmp_path, rounds, configuration):
    """Composed out of the original, and out of a model that was pruned before."""
    origin, composed, n = made / "origin.pth", tmp_path / "first.pth", configuration
    for i in range(rounds):
        if i:
            origin, composed = composed, tmp_path / "second.pth"
        pruned = tmp_path / f"{i}.npy"
        assert stage("prune", "-m", origin, "-c", made / "scheme.json", "-o", pruned).code == 0
        assert stage("compose_model", "-m", origin, "-p", pruned, "-c", made / "conf.json", "-n", n, "-o",
                     composed).code == 0
    chosen = read_configurations(made / "conf.json")[n]
    planned = plan.training(read_header(origin), chosen, 1024, 1, 1, composes=True)
    alone = plan.training(read_header(composed), {}, 1024, 1, 1)
    loaded = models.load(composed)
    network, _ = shrunk(loaded.network, used(loaded.network, loaded.masks))
    for found in (planned, alone):
        # More than so, because single weights that go may leave a unit with none; it goes, too.
        assert 1 <= found["operations"] / (3 * counted(network)) < 1.3
        left, bits = loaded_parameters(loaded), sum(mask.numel() for mask in loaded.masks.values())
        assert found["parameters"] == pytest.approx(left, rel=0.08)  # whole heads and units are removed
        assert found["disk"] == pytest.approx(4 * left + bits / 8, rel=0.08)
    taught = plan.training(read_header(composed), {}, 1024, 1, 1, read_header(origin))
    teacher = models.load(origin)
    teacher, _ = shrunk(teacher.network, used(teacher.network, teacher.masks))
    assert taught["operations"] == pytest.approx(alone["operations"] + counted(teacher))
    thrice, config = plan.training(read_header(composed), {}, 1024, 3, 1, read_header(origin)), teacher.config
    head = 2 * plan.TOKENS * config.vocab_size * config.d_model  # all the teacher does after the first epoch
    assert thrice["operations"] == pytest.approx(3 * alone["operations"] + counted(teacher) + 2 * head)
    assert thrice["memory"] - taught["memory"] == 4 * plan.TOKENS * config.d_model


def loaded_parameters(model) -> int:
    """Return how many weights are not removed."""
    return sum(int(model.masks[name].sum()) if name in model.masks else p.numel()
               for name, p in model.network.named_parameters())


def test_files_that_do_not_belong_together_are_refused(made, stage, tmp_path):
    """As without --plan."""
    save_folder(tmp_path / "hub", num_layers=3)
    assert stage("download_model", "-m", tmp_path / "hub", "-o", tmp_path / "deep.pth").code == 0
    assert stage("config_generator", "-m", tmp_path / "deep.pth", "-o", tmp_path / "conf.json", "--attention", 0.25,
                 "--linear", 0.5).code == 0
    assert stage("prune_scheme_generator", "-i", tmp_path / "conf.json", "-o", tmp_path / "scheme.json").code == 0
    origin, tuned = made / "origin.pth", made / "tuned.npy"
    for name, arguments, said in (
            ("prune", ["-m", origin, "-c", tmp_path / "scheme.json"], "the model has no such module"),
            ("block-level_finetuning", ["-m", tmp_path / "deep.pth", "-p", tuned], "was made from another model"),
            ("model-level_finetuning", ["-m", origin, "-p", tuned, "-c", tmp_path / "conf.json"], "lacks what the"),
            ("model-level_finetuning", ["-m", origin, "-p", made / "conf.json", "-c", made / "conf.json"], "conf.json"),
            ("baseline_finetuning", ["-m", origin, "--teacher", made / "conf.json"], "is not a model file")):
        result = stage(name, *arguments, "-o", tmp_path / "out", "--plan")
        assert result.code == 2 and said in result.err and result.err.count("error:") == 1, result.err


def test_operations_of_a_pair_by_hand(made):
    """Against a count of every matrix product that the network runs."""
    network = models.load(made / "origin.pth").network
    ids = torch.ones(1, 7, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        network(*ids)
    assert Shape.of(network).operations(7, 5) == counted.get_total_flops()
