import platform
from pathlib import Path

import pytest
import torch

from common.files.jsonfile import parse_json, to_json
from common.files.provenance import GENERATIONS, ancestry, is_provenance, provenance


def test_it_holds_stage_arguments_versions_and_inputs():
    told = provenance("x.py", {"seed": 7, "model": Path("a/m.pth"), "rates": (0.5, 1)},
                      {"bank": (Path("a/b.npy"), "0" * 64, {"stage": "y.py"})})
    assert told["stage"] == "x.py" and told["arguments"] == {"model": "a/m.pth", "rates": [0.5, 1], "seed": 7}
    assert told["versions"]["python"] == platform.python_version()
    assert told["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["inputs"] == {"bank": {"file": "b.npy", "sha256": "0" * 64, "provenance": {"stage": "y.py"}}}
    assert is_provenance(parse_json(to_json(told).encode(), "x"))


def test_the_ancestry_is_a_tree_of_what_was_given_and_from_what():
    first = provenance("first.py", {"seed": 7}, {})
    lines = ancestry(provenance("second.py", {"lr": 0.1, "resume": False, "teacher": None}, {
        "model": (Path("m.pth"), "1" * 64, first), "text": (Path("t"), "2" * 64, {})})).splitlines()
    assert [line for line in lines if "with python" not in line] == [
        "made by second.py: lr=0.1", f"  model: m.pth (sha256 {'1' * 64})", "    made by first.py: seed=7",
        f"  text: t (sha256 {'2' * 64})"]


def test_a_hundred_generations_can_be_read():
    told = {}
    for generation in range(100):
        told = provenance("x.py", {"generation": generation}, {"model": (Path("m.pth"), "0" * 64, told)})
    lines = ancestry(parse_json(to_json(told).encode(), "x"))
    oldest = 98 - GENERATIONS  # the latest generation's inputs are one, the earlier ones count from there
    assert "generation=99\n" in lines and f"generation={oldest}\n" in lines
    assert f"generation={oldest - 1}\n" not in lines and lines.count("sha256") == GENERATIONS + 2


@pytest.mark.parametrize("value", [
    None, {"inputs": 5}, {"arguments": []}, {"stage": 1}, {"inputs": {"m": {"file": "f", "sha256": "0"}}},
    {"inputs": {"m": {"file": "f", "sha256": "0", "provenance": {"versions": 3}}}}])
def test_what_has_another_shape_is_noticed(value):
    assert not is_provenance(value)


def test_an_argument_in_another_encoding_can_be_written():
    assert provenance("x.py", {"label": "b\udcffc"}, {})["arguments"]["label"] == "b\ufffdc"
