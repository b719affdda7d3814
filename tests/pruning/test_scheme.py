import json

import pytest

from common.errors import UserError
from common.files.jsonfile import sealed
from common.pruning.scheme import FORMAT, VERSION, make_scheme, read_scheme, scheme_digest, write_scheme

ATTENTION, WI = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense.wi"


def test_it_lists_each_variant_once_and_leaves_out_rate_0():
    scheme = make_scheme([
        {ATTENTION: 0.5, f"{ATTENTION}.o": 0.8, WI: 0.5}, {ATTENTION: 0.5, f"{ATTENTION}.o": 0.8, WI: 0.0},
        {f"{ATTENTION}.o": 0.5, WI: 0.5}, {ATTENTION: 0.25}])
    assert scheme == {ATTENTION: [(0.5, 0.8), (0.0, 0.5), (0.25, 0.0)], WI: [(0.5,)]}


def test_a_written_scheme_reads_back(tmp_path):
    scheme = {ATTENTION: [(0.5, 0.25)], WI: [(0.5,), (0.8,)]}
    write_scheme(tmp_path / "s.json", scheme, {"stage": "x"})
    assert read_scheme(tmp_path / "s.json") == (scheme, {"stage": "x"})


def test_an_edited_scheme_is_refused(tmp_path):
    path = tmp_path / "s.json"
    write_scheme(path, {WI: [(0.5,)]}, {})
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="was edited after it was made.*prune_scheme_generator.py"):
        read_scheme(path)


def test_every_problem_of_its_blocks_is_named(tmp_path):
    blocks = {f"{ATTENTION}.o": [{f"{ATTENTION}.o": 0.5}], WI: [{WI: 1.0}, {}], ATTENTION: []}
    (tmp_path / "s.json").write_bytes(sealed({"format": FORMAT, "version": VERSION, "blocks": blocks,
                                              "provenance": {}}))
    with pytest.raises(UserError) as caught:
        read_scheme(tmp_path / "s.json")
    for part in (f"'{ATTENTION}.o': is not a block that can be pruned", f"{WI}: pruning rate 1.0 is not in [0, 1)",
                 f"{WI}: a variant needs rates of {WI}", f"{ATTENTION}: lists no variant"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("content", "complaint"), [
    ([{WI: 0.5}], "is not a pruning scheme"),
    ({"format": FORMAT, "version": 1}, "scheme version 1, this toolkit reads"),
    ({"format": FORMAT, "version": VERSION, "blocks": {}}, "holds nothing to prune")])
def test_another_file_is_refused(tmp_path, content, complaint):
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=complaint):
        read_scheme(tmp_path / "s.json")


def test_the_digest_is_of_blocks_and_rates():
    digests = {scheme_digest(s) for s in ({WI: [(0.5,)]}, {WI: [(0.8,)]}, {WI: [(0.5,), (0.8,)]},
                                          {WI.replace("0", "1"): [(0.5,)]})}
    assert len(digests) == 4 and scheme_digest({WI: [(0.5,)]}) in digests
