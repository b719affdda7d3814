import json

import pytest
import torch

from common import hub, masking, models
from common.files import UserError
from tests.conftest import make_tokenizer, save_folder


def logits(network, labels=None):
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        return network(input_ids=ids, decoder_input_ids=ids).logits


def test_a_saved_model_loads_equal(work, origin):
    origin_again = models.load(work / "origin.pth")
    assert torch.equal(logits(origin.network), logits(origin_again.network))
    assert origin_again.prefix == "" and origin_again.identity == origin.identity
    assert origin_again.network.lm_head.weight is origin_again.network.shared.weight


def test_loading_equals_the_hugging_face_model(made, tmp_path, origin):
    network = save_folder(tmp_path / "again")
    assert torch.equal(logits(network), logits(origin.network))


def test_a_folder_whose_configuration_names_no_start_token_begins_with_padding(tmp_path):
    save_folder(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    del config["decoder_start_token_id"]
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    network = hub.load_folder(tmp_path / "hub", "en", "de").network
    assert network.config.decoder_start_token_id == network.config.pad_token_id == 0


@pytest.mark.parametrize(("kind", "changes"), [
    ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "untie": True}),
    ("mt5", {"untie": True}),
    ("t5", {"num_decoder_layers": 1, "d_kv": 4}),
])
def test_the_family_survives_saving(tmp_path, kind, changes):
    network = save_folder(tmp_path / "hub", kind, **changes)
    models.save(tmp_path / "m.pth", models.Model(network, make_tokenizer().to_str()))
    again = models.load(tmp_path / "m.pth").network
    assert torch.equal(logits(network), logits(again))
    assert (again.lm_head.weight is again.shared.weight) == ("untie" not in changes)


def test_a_mask_of_ones_leaves_logits_bit_identical(work):
    model = models.load(work / "origin.pth")
    before = logits(model.network)
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    masking.enforce(model.network, {name: torch.ones_like(model.network.get_parameter(name), dtype=torch.bool)})
    assert torch.equal(before, logits(model.network))


def test_masks_survive_saving(work, made):
    model = models.load(made / "pruned.pth")
    models.save(work / "again.pth", model)
    again = models.load(work / "again.pth")
    assert model.masks.keys() == again.masks.keys()
    assert all(torch.equal(model.masks[k], again.masks[k]) for k in model.masks)


def test_identity_is_of_the_content_not_of_its_making(work):
    model = models.load(work / "origin.pth")
    first, model.provenance = model.identity, {"stage": "elsewhere"}
    models.save(work / "again.pth", model)
    assert model.identity == first
    with torch.no_grad():
        model.network.shared.weight[0, 0] += 1
    models.save(work / "again.pth", model)
    assert model.identity != first


def test_every_flipped_bit_is_noticed(work):
    path = work / "origin.pth"
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(good), (60,), generator=generator).tolist() + [0, 30, len(good) - 1, len(good) - 80]
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1:])
        with pytest.raises(UserError, match="origin.pth"):
            models.load(path)


def test_a_sealed_file_that_does_not_fit_together_is_refused(work):
    path = work / "origin.pth"
    content = models.load_sealed(path, "a model file")
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    weights = dict(content["weights"])
    for change, complaint in (
        ({"weights": {}}, "weights do not fit"),
        ({"weights": weights | {name: torch.zeros(1, 1)}}, "weights do not fit"),
        ({"weights": weights | {name: torch.zeros(1).expand(48, 32)}}, "not a complete model file"),
        ({"config": '{"model_type": "bert"}'}, "is a 'bert' model"),
        ({"config": '{"model_type": "t5", "d_model": 99999999999}'}, "d_model = 99999999999"),
        ({"config": "[]"}, "not a complete model file"),
        ({"masks": {name: torch.zeros(3, dtype=torch.uint8)}}, "its mask of"),
        ({"tokenizer": "{}"}, "its tokenizer cannot be read"),
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "is not a model file"),
    ):
        models.save_sealed(path, content | change)
        with pytest.raises(UserError) as caught:
            models.load(path)
        assert complaint in str(caught.value)
