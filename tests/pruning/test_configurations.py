import json

import pytest

from common.errors import UserError
from common.pruning import configurations as configs

ATTENTION, WI = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense.wi"


def test_all_problems_of_a_file_are_told_together(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{WI: 1.3, "shared": 0.5}, {WI: "half"}, {WI: True}, 7]))
    with pytest.raises(UserError) as caught:
        configs.read_configurations(path)
    message = str(caught.value)
    for part in (f"configuration 0: {WI}: pruning rate 1.3 is not in [0, 1)",
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


def test_a_written_configuration_reads_back(tmp_path):
    uniform = configs.uniform({ATTENTION: "attention", f"{ATTENTION}.o": "linear", WI: "linear"}, 0.25, 0.5)
    assert uniform == {ATTENTION: 0.25, f"{ATTENTION}.o": 0.5, WI: 0.5}
    (tmp_path / "c.json").write_text(json.dumps([uniform, {WI: 0}]))
    assert configs.read_configurations(tmp_path / "c.json") == [uniform, {WI: 0.0}]


def test_nth_names_the_range(tmp_path):
    assert configs.nth([{WI: 0.5}, {}], 0, tmp_path) == {WI: 0.5}
    with pytest.raises(UserError, match="there is no configuration 3; it holds 3, numbered from 0 to 2"):
        configs.nth([{}, {}, {}], 3, tmp_path)


def test_modules_that_the_model_lacks_are_all_named(tmp_path):
    with pytest.raises(UserError) as caught:
        configs.check_modules([WI, ATTENTION, f"{ATTENTION}.o"], {WI: "linear"}, tmp_path)
    assert f"{ATTENTION}: the model has no such module" in str(caught.value) and WI not in str(caught.value)


def test_an_attention_and_its_o_are_one_variant_and_rate_0_is_none():
    assert configs.required_variants({f"{ATTENTION}.o": 0.5, ATTENTION: 0.25, WI: 0.0}) == {ATTENTION: (0.25, 0.5)}
    assert configs.required_variants({f"{ATTENTION}.o": 0.5}) == {ATTENTION: (0.0, 0.5)}
    assert configs.required_variants({ATTENTION: 0.5, WI: 0.8}) == {ATTENTION: (0.5, 0.0), WI: (0.8,)}
