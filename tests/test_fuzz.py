"""Mutated and hostile files: a parser reads them or refuses them with one message, quickly, in little memory."""

import io
import json
import pickle
import random
import time
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import plot_loss
from common import cli, configs, files, models
from common.files import UserError
from tests.conftest import make_tokenizer, save_folder
from tests.mutants import Parsers, complaint

FAST, SLOW = 400, 200
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(st.characters(codec="utf-8")),
                    lambda x: st.lists(x) | st.dictionaries(st.text(st.characters(codec="utf-8")), x), max_leaves=20)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    return Parsers(tmp_path_factory.mktemp("fuzz"))


def examples(number):
    """Return settings: the same examples every time (benchmarks/fuzz.py tries others), no shrinking of a seed."""
    return settings(max_examples=number, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(("kind", "number"), [
    ("configuration", FAST), ("scheme", FAST), ("sensitivity", FAST), ("bank", FAST), ("statistics", FAST),
    ("corpus", FAST), ("packed corpus", FAST), ("checkpoint", SLOW), ("model", SLOW), ("hub folder", FAST)])
def test_a_mutant_is_read_or_refused(parsers, kind, number):
    seen = {"read": 0, "refused": 0}

    @examples(number)
    @given(st.integers(0, 2**64).map(random.Random))
    def check(rng):
        message = parsers.outcome(kind, parsers.mutate(kind, rng))  # anything but a UserError is raised
        seen["read" if message is None else "refused"] += 1
        assert message is None or complaint(message) is None, message

    check()
    assert min(seen.values()) > number // 50, seen  # the mutants are neither all broken nor all harmless


@pytest.mark.parametrize("kind", ["configuration", "scheme", "sensitivity", "bank", "statistics", "corpus",
                                  "packed corpus", "checkpoint", "model", "hub folder"])
def test_the_sample_that_is_mutated_is_read(parsers, kind):
    assert parsers.outcome(kind, parsers.samples[kind]) is None


@examples(FAST)
@given(JSON)
def test_json_is_read_as_it_was_written(value):
    assert files.parse_json(json.dumps(value).encode(), "x") == value


@examples(FAST)
@given(st.binary(max_size=300) | st.text('{}[]",:\\0e-u.').map(str.encode))
def test_any_bytes_are_json_or_refused(data):
    try:
        value = files.parse_json(data, "x")
    except UserError as error:
        assert complaint(str(error)) is None
    else:
        assert value == json.loads(data.decode("utf-8-sig"))


@examples(FAST)
@given(st.lists(st.tuples(*[st.floats(0, 1e29)] * 5), min_size=1))
def test_statistics_are_read_as_they_were_written(parsers, rows):
    from common.training import statistics_csv

    path = parsers.paths["statistics"]
    path.write_bytes(statistics_csv([list(row) for row in rows], plot_loss.NEEDED))
    assert list(zip(*plot_loss.read(path).values(), strict=True)) == rows


@pytest.mark.parametrize("data", [
    b'["' + b'\\"' * 200_000, b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b',"99999":0}',
    b'"' * 200_001, b"[" * 200_000, b"9" * 5000, b'["\\ud800"]'],
    ids=["quotes without end", "many keys, one twice", "open quote", "deep", "long number", "half a character"])
def test_costly_json_is_refused_quickly(data):
    began = time.perf_counter()
    with pytest.raises(UserError):
        files.parse_json(data, "x")
    assert time.perf_counter() - began < 2


def test_a_character_of_two_halves_is_read():
    assert files.parse_json(b'["\\ud83d\\ude00"]', "x") == ["\U0001f600"]


def test_a_rate_of_400_digits_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('[{"encoder.block.0.layer.1.DenseReluDense.wi": 1' + "0" * 400 + "}]")
    with pytest.raises(UserError, match=r"pruning rate 10+\.\.\.0+ is not in \[0, 1\)"):
        configs.read_configurations(path)


def test_a_scheme_of_many_variants_is_made_quickly():
    began = time.perf_counter()
    name = "encoder.block.0.layer.1.DenseReluDense.wi"
    assert len(configs.make_scheme([{name: i / 100_000} for i in range(1, 100_000)])[name]) == 99_999
    assert time.perf_counter() - began < 5


class Calls:
    """Unpickling this calls something that torch's own list for ``weights_only`` allows."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def sealed(path, value, **entries):
    """Write a sealed zip file around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, 2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    models._seal_file(file)
    path.write_bytes(file.getvalue())
    return path


@pytest.mark.parametrize("value", [
    Calls(bytearray, 1 << 33), Calls(torch.Tensor, 1 << 40), Calls(torch.device, "cuda")])
def test_a_pickle_that_calls_anything_but_tensors_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"nothing in it was run \(it names '"):
        models.load_sealed(sealed(tmp_path / "m.pth", {"format": value}), "a model file")


def test_the_sealed_pickles_of_these_tests_are_sound(tmp_path):
    assert models.load_sealed(sealed(tmp_path / "m.pth", {"format": 1}), "a model file") == {"format": 1}


def test_lists_inside_lists_a_billion_times_are_not_printed(parsers):
    laughs = []
    for _ in range(60):
        laughs = [laughs, laughs]
    content = torch.load(io.BytesIO(parsers.samples["model"]), weights_only=True)
    models.save_sealed(parsers.paths["model"], content | {"version": laughs})
    with pytest.raises(UserError, match="model file version"):
        models.load(parsers.paths["model"])


def hostile_tensor(kind):
    tensor = torch.zeros(8, 8)
    if kind == "attribute":
        tensor.numel = 5
    return {"float64": tensor.double(), "meta": tensor.to("meta"), "not finite": tensor / 0, "complex": tensor * 1j,
            "expanded": torch.zeros(1).expand(8, 8), "negated view": torch._neg_view(tensor), "attribute": tensor,
            "list": [[0.0] * 8] * 8, "sparse": tensor.to_sparse(), "text": "x"}[kind]


@pytest.mark.parametrize("kind", ["float64", "meta", "not finite", "sparse", "expanded", "negated view", "list",
                                  "attribute", "text", "complex"])
def test_a_weight_that_is_no_plain_tensor_is_refused(parsers, kind):
    content = torch.load(io.BytesIO(parsers.samples["model"]), weights_only=True)
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    assert content["weights"][name].shape == (8, 8)
    models.save_sealed(parsers.paths["model"], content | {"weights": content["weights"] | {name: hostile_tensor(kind)}})
    with pytest.raises(UserError):
        models.load(parsers.paths["model"])


@pytest.mark.parametrize("change", [
    {"version": torch.zeros(3)}, {"weights": {1: torch.zeros(2)}}, {"aliases": '{"lm_head.weight": []}'},
    {"identity": "x"}, {"prefix": "\ud800"}, {"provenance": '{"inputs": 5}'}, {"provenance": '{"arguments": []}'},
    {"config": "\ud800"}])
def test_odd_parts_of_a_model_file_are_refused(parsers, change):
    content = torch.load(io.BytesIO(parsers.samples["model"]), weights_only=True)
    models.save_sealed(parsers.paths["model"], content | change)
    with pytest.raises(UserError):
        models.load(parsers.paths["model"])


def test_a_mask_that_weights_reach_beyond_is_refused(parsers):
    content = torch.load(io.BytesIO(parsers.samples["model"]), weights_only=True)
    content["masks"] = {name: torch.zeros_like(bits) for name, bits in content["masks"].items()}
    models.save_sealed(parsers.paths["model"], content)
    with pytest.raises(UserError, match="has weights outside its mask"):
        models.load(parsers.paths["model"])


@pytest.mark.parametrize("name", ["shared.weight", "encoder.final_layer_norm.weight", "none"])
def test_a_mask_of_what_is_never_pruned_is_refused(parsers, name):
    content = torch.load(io.BytesIO(parsers.samples["model"]), weights_only=True)
    content["masks"] = {name: torch.full((-(-content["weights"].get(name, torch.zeros(8)).numel() // 8),), 255,
                                         dtype=torch.uint8)}
    models.save_sealed(parsers.paths["model"], content)
    with pytest.raises(UserError, match=f"its mask of '{name}' does not fit"):
        models.load(parsers.paths["model"])


def test_a_tokenizer_that_pads_to_a_billion_tokens_does_not():
    tokenizer = make_tokenizer()
    tokenizer.enable_padding(length=1_000_000_000)
    assert len(models.Model(None, tokenizer.to_str()).tokenizer.encode("a man").ids) < 20


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_does_not_name_code_to_load(key):
    config = {"model_type": "t5", "d_model": 8, "d_kv": 2, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 9}
    network = models.build_network(config | {key: "somebody/kernels"})
    assert network.config._attn_implementation in ("eager", "sdpa")


@pytest.mark.parametrize(("change", "complaint"), [
    ({"attn_implementation": "somebody/kernels"}, "asks for foreign code"), ({"auto_map": {"x": "y"}}, "foreign code"),
    ({"quantization_config": {"quant_method": "x"}}, "foreign code"), ({"num_labels": 10**9}, "num_labels = 10+;"),
    ({"num_layers": 200}, "asks for [0-9,]+ bytes of weights or more, there"), ({"num_layers": 10**9}, "num_layers"),
    ({"task_specific_params": [1]}, "task_specific_params"), ({"dropout_rate": 2}, "dropout_rate = 2"),
    ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon = 'x'"), ({"eos_token_id": 10**6}, "is not below vocab_size"),
    ({"relative_attention_max_distance": 3}, "relative_attention_max_distance"), ({"num_heads": True}, "num_heads"),
])
def test_a_hub_configuration_that_asks_for_too_much_is_refused(tmp_path, change, complaint):
    save_folder(tmp_path / "hub", d_model=8, d_kv=2, d_ff=8, num_heads=2, num_layers=1, num_decoder_layers=1)
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=complaint):
        models.read_config(tmp_path / "hub")


@pytest.mark.parametrize(("change", "complaint"), [
    ({"batch": 2}, "its epoch 1 has no batch 2"), ({"batch": -1}, "its batch is -1"), ({"epoch": "1"}, "its epoch"),
    ({"rows": [[1]]}, "its rows is"), ({"rows": []}, "its counters are not complete"), ({"more": 1}, "not complete"),
    ({"best_loss": None}, "its best_loss is None")])
def test_a_checkpoint_with_odd_counters_is_refused(parsers, change, complaint):
    """One batch too many, and the loop over an epoch's batches would never end."""
    content = torch.load(io.BytesIO(parsers.samples["checkpoint"]), weights_only=True)
    file = parsers.paths["checkpoint"]
    models.save_sealed(file, content | {"state": content["state"] | change})
    assert complaint in parsers.outcome("checkpoint", file.read_bytes())


@pytest.mark.parametrize(("change", "complaint"), [
    ({"weights": {"weight": torch.zeros(1), "bias": torch.zeros(1)}}, "its weights are not"), ({"best": {}}, "best"),
    ({"optimizer": {"state": {0: {"step": torch.zeros(())}}}}, "its optimizer is not"), ({"rng": {}}, "it lacks 'cpu'"),
    ({"optimizer": {"state": {9: {}}}}, "does not fit this run"), ({"fingerprint": {"a": torch.zeros(2)}}, "is not a"),
    ({"fingerprint": {"a": 2}}, "is of another run")])
def test_a_checkpoint_of_odd_tensors_is_refused(parsers, change, complaint):
    content = torch.load(io.BytesIO(parsers.samples["checkpoint"]), weights_only=True)
    file = parsers.paths["checkpoint"]
    models.save_sealed(file, content | change)
    assert complaint in parsers.outcome("checkpoint", file.read_bytes())


@pytest.mark.parametrize("row", ["1e308,,1,1,1", "0,,1e40,1,1", "0,,1,-1e300,1", "0,,nan,1,1"])
def test_statistics_that_no_axis_can_show_are_refused(tmp_path, row):
    (tmp_path / "s.csv").write_text(",".join(plot_loss.NEEDED) + "\n" + row + "\n")
    with pytest.raises(cli.UserError, match="line 2: epoch, valid_loss and train_seconds must be finite"):
        plot_loss.read(tmp_path / "s.csv")


def test_a_label_that_looks_like_a_formula_is_drawn(made, tmp_path, stage):
    result = stage("plot_loss", made / "block.csv", "--label", "a$x^{$", "--title", "$_$", "-o", tmp_path / "a.png")
    assert result.code == 0, result.err
