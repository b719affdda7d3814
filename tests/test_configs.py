import json

import pytest

from common import configs
from common.files import UserError

ATTENTION, WI = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense.wi"


def test_scheme_lists_each_variant_once_and_leaves_out_rate_0():
    scheme = configs.make_scheme([
        {ATTENTION: 0.5, f"{ATTENTION}.o": 0.8, WI: 0.5}, {ATTENTION: 0.5, f"{ATTENTION}.o": 0.8, WI: 0.0},
        {f"{ATTENTION}.o": 0.5, WI: 0.5}, {ATTENTION: 0.25}])
    assert scheme == {ATTENTION: [(0.5, 0.8), (0.0, 0.5), (0.25, 0.0)], WI: [(0.5,)]}


def test_a_written_scheme_reads_back(tmp_path):
    scheme = {ATTENTION: [(0.5, 0.25)], WI: [(0.5,), (0.8,)]}
    configs.write_scheme(tmp_path / "s.json", scheme, {"stage": "x"})
    assert configs.read_scheme(tmp_path / "s.json") == (scheme, {"stage": "x"})


def test_an_edited_scheme_is_refused(tmp_path):
    path = tmp_path / "s.json"
    configs.write_scheme(path, {WI: [(0.5,)]}, {})
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="was edited after it was made.*prune_scheme_generator.py"):
        configs.read_scheme(path)


def test_all_problems_of_a_file_are_told_together(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{ATTENTION: 1.3, "shared": 0.5}, {WI: "half"}, {WI: True}, 7]))
    with pytest.raises(UserError) as caught:
        configs.read_configurations(path)
    message = str(caught.value)
    for part in (f"configuration 0: {ATTENTION}: pruning rate 1.3 is not in [0, 1)",
                 "configuration 0: 'shared': is not a module that can be pruned",
                 f"configuration 1: {WI}: pruning rate 'half' is not a number",
                 f"configuration 2: {WI}: pruning rate True is not a number",
                 "configuration 3: is not {module: rate}"):
        assert part in message


@pytest.mark.parametrize(("content", "complaint"), [
    ("{}", "a configuration file is a list"), ("[]", "holds no configuration"), ("[", "is not valid JSON"),
    ('[{"a": 1, "a": 2}]', "the key 'a' stands twice"), ("[" * 200 + "]" * 200, "nested more than"),
    (f'[{{"{WI}": NaN}}]', "NaN is not a JSON number"), (f'[{{"{WI}": 1e999}}]', "is not in [0, 1)"),
    ("\udcff", "is not valid JSON"),
])
def test_bad_configuration_files(tmp_path, content, complaint):
    path = tmp_path / "c.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        configs.read_configurations(path)
    assert complaint in str(caught.value)


def test_nth_names_the_range(tmp_path):
    with pytest.raises(UserError, match="there is no configuration 7; it holds 3, numbered from 0 to 2"):
        configs.nth([{}, {}, {}], 7, tmp_path)
