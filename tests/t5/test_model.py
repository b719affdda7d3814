import json
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from common.files.archive import load_sealed, save_sealed
from common.t5 import model as models
from common.t5.header import read_header
from tests.small import logits_of, make_tokenizer, small_network

WI = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
HALVES = (torch.float16, torch.bfloat16)


def logits(network):
    ids = torch.arange(3, 23).view(2, 10)
    return logits_of(network, ids, ids)


@pytest.fixture
def path(made, tmp_path):
    """A private copy of a pruned model's file."""
    models.save(tmp_path / "m.pth", models.load(made / "pruned.pth"))
    return tmp_path / "m.pth"


def change(path, **changes):
    """Write other content to a model file, sealed."""
    save_sealed(path, load_sealed(path, "a model file") | changes)


@pytest.mark.parametrize(("kind", "changes"), [
    ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}), ("mt5", {}), ("t5", {"d_kv": 4}),
    ("t5", {"num_decoder_layers": 1, "dense_act_fn": "gelu"})])
def test_the_family_survives_saving(tmp_path, kind, changes):
    network = small_network(kind, **{"vocab_size": 300} | changes)
    model = models.Model(network, make_tokenizer().to_str(), "x: ", "fr", "pt_BR", provenance={"stage": "x"})
    models.save(tmp_path / "m.pth", model)
    again = models.load(tmp_path / "m.pth")
    assert torch.equal(logits(network), logits(again.network)) and not again.network.training
    assert (again.network.lm_head.weight is again.network.shared.weight) == (
        network.lm_head.weight is network.shared.weight)
    for name in ("tokenizer_json", "prefix", "source", "target", "identity", "provenance"):
        assert getattr(again, name) == getattr(model, name), name


def test_masks_survive_saving(path, made):
    before, after = models.load(made / "pruned.pth"), models.load(path)
    assert before.masks.keys() == after.masks.keys() and before.masks
    assert all(torch.equal(before.masks[k], after.masks[k]) for k in before.masks)
    assert not after.network.get_parameter(WI)[~after.masks[WI]].any()


def test_a_mask_is_bits_row_by_row():
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    assert models.pack_mask(mask).tolist() == [0b10100111, 0b10000000]
    assert torch.equal(models.unpack_mask(models.pack_mask(mask), mask.shape), mask)


def test_identity_is_of_the_content_not_of_its_making(path):
    model = models.load(path)
    first, model.provenance = model.identity, {"stage": "elsewhere"}
    models.save(path, model)
    assert model.identity == first
    with torch.no_grad():
        model.network.shared.weight[0, 0] += 1
    models.save(path, model)
    assert model.identity != first


def test_a_file_without_languages_is_english_to_german(path):
    content = load_sealed(path, "a model file")
    del content["source"], content["target"]
    save_sealed(path, content)
    model = models.load(path)
    assert (model.source, model.target) == ("en", "de")


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "a" * 21, "e n", "en\n", "ü"])
def test_a_language_that_is_no_part_of_a_file_name_is_refused(path, name):
    change(path, target=name)
    with pytest.raises(UserError, match="m.pth: its target language is .*, not a name such as en"):
        models.load(path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"weights": {}}, "its weights do not fit its configuration"), ({"config": "[]"}, "not a complete model file"),
    ({"config": '{"model_type": "bert"}'}, "is a 'bert' model"), ({"config": "\ud800"}, "not a complete model file"),
    ({"config": '{"model_type": "t5", "d_model": 99999999999}'}, "d_model = 99999999999"),
    ({"masks": {WI: torch.zeros(3, dtype=torch.uint8)}}, "its mask of 'encoder.* does not fit"),
    ({"masks": {WI: torch.zeros(192, dtype=torch.uint8)}}, "wi.weight has 768 values, and its mask keeps 0"),
    ({"masks": {"shared.weight": torch.full((1200,), 255, dtype=torch.uint8)}}, "its mask of 'shared.weight' does not"),
    ({"masks": {"none": torch.full((1,), 255, dtype=torch.uint8)}}, "its mask of 'none' does not fit"),
    ({"tokenizer": "{}"}, "its tokenizer cannot be read"), ({"version": 99}, "version 99, this toolkit reads 3"),
    ({"version": torch.zeros(3)}, "model file version"), ({"format": "other"}, "is not a model file of this toolkit"),
    ({"identity": "x"}, "not a complete"), ({"prefix": "\ud800"}, "not a complete"),
    ({"source": torch.zeros(2)}, "not a complete"), ({"aliases": '{"lm_head.weight": []}'}, "do not fit"),
    ({"provenance": '{"inputs": 5}'}, "not a complete")])
def test_a_sealed_file_that_does_not_fit_together_is_refused(path, changes, message):
    change(path, **changes)
    with pytest.raises(UserError, match=f"m.pth.*{message}"):
        models.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_holds_kept_weights_and_a_bit_for_each_weight_that_a_mask_covers(path, dtype):
    model, size = models.load(path), dtype.itemsize
    models.save(path, models.rounded(model, dtype), dtype)
    total, covered = sum(p.numel() for p in model.network.parameters()), sum(m.numel() for m in model.masks.values())
    kept = total - covered + sum(int(m.sum()) for m in model.masks.values())
    content = load_sealed(path, "a model file")
    assert sum(t.nbytes for t in content["weights"].values()) == size * kept
    assert sum(t.numel() for t in content["masks"].values()) == covered / 8
    texts = sum(len(content[key].encode()) for key in ("tokenizer", "provenance", "config", "aliases"))
    zipped = 350 * (len(content["weights"]) + len(content["masks"]))  # what the archive says of each tensor
    assert path.stat().st_size - texts < 1.02 * (size * kept + covered / 8) + zipped


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_file_is_the_rounded_model_with_an_identity_of_its_own(path, tmp_path, dtype):
    before, half = models.load(path), tmp_path / "half.pth"
    models.save(half, rounded := models.rounded(before, dtype), dtype)
    after = models.load(half)
    for (name, p), q in zip(before.network.state_dict().items(), after.network.state_dict().values(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(q, p.to(dtype).float()), name
    assert after.masks.keys() == before.masks.keys()
    assert all(torch.equal(after.masks[name], mask) for name, mask in before.masks.items())
    assert after.network.lm_head.weight is after.network.shared.weight
    assert not torch.equal(before.network.shared.weight, rounded.network.shared.weight)  # a copy was rounded
    assert after.identity == rounded.identity != before.identity
    models.save(path, after)  # the same weights, stored in float32
    assert models.load(path).identity == after.identity


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_file_with_any_bit_flipped_is_refused(path, dtype):
    models.save(path, models.rounded(models.load(path), dtype), dtype)
    data = bytearray(path.read_bytes())
    for at in range(4, len(data), len(data) // 20):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        with pytest.raises(UserError, match="m.pth: is"):
            models.load(path)


def test_a_weight_too_large_for_the_type_is_named_and_one_that_rounds_to_the_largest_is_not(path):
    model = models.load(path)
    weight = model.network.shared.weight.detach()
    weight[0, 0] = -65510.0
    assert models.rounded(model, torch.float16).network.shared.weight[0, 0] == -65504
    weight[0, 0] = -65520.0
    with pytest.raises(UserError, match="shared.weight has a weight of 65520; the largest that float16 holds is 65504"):
        models.rounded(model, torch.float16)
    assert models.rounded(model, torch.bfloat16).network.shared.weight[0, 0] == -65536
    weight[0, 0] = 3.4e38
    with pytest.raises(UserError, match="the largest that bfloat16 holds is 3.38953e.38"):
        models.rounded(model, torch.bfloat16)


@pytest.mark.parametrize(("version", "types"), [
    (2, HALVES[:1]), (1, HALVES[1:]), (3, HALVES), (3, (torch.float16, torch.float32)), (3, (torch.float64,))])
def test_weights_of_another_type_than_the_version_has_or_of_several_are_refused(path, version, types):
    weights = load_sealed(path, "a model file")["weights"]
    change(path, version=version,
           weights={name: t.to(types[i % len(types)]) for i, (name, t) in enumerate(weights.items())})
    with pytest.raises(UserError, match="is not a complete model file"):
        models.load(path)


def test_half_weights_that_share_their_bytes_are_refused_before_they_become_float32(path):
    content = load_sealed(path, "a model file")
    most = torch.zeros(max(t.numel() for t in content["weights"].values()), dtype=torch.float16)
    change(path, version=3, weights={name: most[:t.numel()].view(t.shape) for name, t in content["weights"].items()})
    with pytest.raises(UserError, match="is not a complete model file"):
        models.load(path)


def as_version_2(path):
    """Write a file as version 2 was: an entry for each mask."""
    change(path, version=2, masks={name: models.pack_mask(mask) for name, mask in models.load(path).masks.items()})


def as_version_1(path):
    """Write a file as version 1 was: all weights with their zeros."""
    as_version_2(path)
    content, dense = load_sealed(path, "a model file"), models.load(path).network.state_dict()
    change(path, version=1, weights={name: dense[name].detach() for name in content["weights"]})


@pytest.mark.parametrize("as_before", [as_version_1, as_version_2])
def test_a_file_of_an_old_version_is_read_and_has_the_same_identity_now(path, as_before):
    new, header = models.load(path), read_header(path)
    as_before(path)
    assert read_header(path) == header
    old = models.load(path)
    models.save(path, old)
    assert old.identity == new.identity == models.load(path).identity
    assert all(torch.equal(a, b) for a, b in zip(old.network.parameters(), new.network.parameters(), strict=True))
    assert all(torch.equal(old.masks[name], mask) for name, mask in new.masks.items())


def test_weights_outside_a_mask_of_version_1_are_refused(path):
    as_version_1(path)
    change(path, masks={WI: torch.zeros(192, dtype=torch.uint8)})
    with pytest.raises(UserError, match="wi.weight has weights outside its mask"):
        models.load(path)


def test_masks_that_share_their_bits_are_refused_before_they_are_unpacked(path, monkeypatch):
    content, bits = load_sealed(path, "a model file"), torch.zeros(1 << 18, dtype=torch.uint8)
    names = [name for name in models.load(path).masks if "DenseReluDense" in name]
    change(path, config=json.dumps(json.loads(content["config"]) | {"d_ff": 1 << 16}),
           masks=dict.fromkeys(names, bits), weights=content["weights"] | dict.fromkeys(names, torch.zeros(0)))
    assert path.stat().st_size < 2 * len(bits)
    monkeypatch.setattr(models, "unpack_mask", None)
    with pytest.raises(UserError, match="is not a complete model file"):
        models.load(path)


@pytest.mark.parametrize(("weight", "message"), [
    (torch.zeros(1, 1), "do not fit its configuration: 'encoder"), (torch.zeros(48, 32).double(), "not a complete"),
    (torch.zeros(1).expand(48, 32), "not a complete"), (torch.full((48, 32), torch.nan), "that are not finite")])
def test_a_weight_that_is_no_plain_tensor_of_its_shape_is_refused(path, weight, message):
    dense = {name: p.detach() for name, p in models.load(path).network.state_dict().items()}
    change(path, weights={n: dense[n] for n in load_sealed(path, "a model file")["weights"]} | {WI: weight}, masks={})
    with pytest.raises(UserError, match=message):
        models.load(path)


def test_a_tokenizer_that_pads_to_a_billion_tokens_does_not(origin):
    tokenizer = make_tokenizer()
    tokenizer.enable_padding(length=1_000_000_000)
    assert len(replace(origin, tokenizer_json=tokenizer.to_str()).tokenizer.encode("a man").ids) < 20
