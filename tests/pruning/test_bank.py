import numpy as np
import pytest
import torch

from common.errors import UserError
from common.pruning import bank, composition
from common.pruning.bank import Variant
from common.pruning.variants import prune_scheme
from common.t5.model import Model
from tests.small import scheme_of, small_network, write_bank

WI = "encoder.block.0.layer.1.DenseReluDense.wi"


@pytest.fixture
def model():
    return Model(small_network(), "")


@pytest.fixture
def variants(model):
    return list(prune_scheme(model, scheme_of(model.network, (0.25, 0.5), (0.5, 0.8))))


@pytest.fixture
def opened(variants, tmp_path):
    return write_bank(tmp_path / "pruned.npy", variants, origin="1" * 64)


def test_variants_read_back_equal_and_in_order(opened, variants):
    assert list(opened.entries) == [v.key for v in variants] and len(variants) == 28
    for fresh in variants:
        read = opened.read(fresh.key)
        assert fresh.weights.keys() == read.weights.keys() == read.masks.keys()
        for name in fresh.weights:
            assert torch.equal(fresh.weights[name], read.weights[name])
            assert torch.equal(fresh.masks[name], read.masks[name])


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_masks_of_any_size_read_back(tmp_path, kept):
    mask = torch.arange(5).view(1, 5) < kept
    read = write_bank(tmp_path / "b.npy", [Variant(WI, (0.5,), {f"{WI}.weight": 2.0 * mask}, {f"{WI}.weight": mask})]
                      ).read((WI, (0.5,)))
    assert torch.equal(read.masks[f"{WI}.weight"], mask) and torch.equal(read.weights[f"{WI}.weight"], 2.0 * mask)


def test_numpy_reads_it_with_its_defaults(opened):
    array = np.load(opened.path, mmap_mode="r")
    assert array.dtype == np.uint8 and array.ndim == 1


def test_the_file_is_as_small_as_its_sparsity_says(opened):
    kept = sum(t["kept"] for e in opened.entries.values() for t in e["tensors"].values())
    size = sum(np.prod(t["shape"]) for e in opened.entries.values() for t in e["tensors"].values())
    assert sum(e["bytes"] for e in opened.entries.values()) == 4 * kept + size // 8


def test_it_names_scheme_model_and_how_it_was_tuned(opened, variants, tmp_path):
    assert (opened.origin, opened.scheme, opened.tuned) == ("1" * 64, "a scheme", None)
    tuned = write_bank(tmp_path / "t.npy", variants, "joint")
    assert tuned.tuned == "joint" and tuned.keeps_hidden and not opened.keeps_hidden


def test_every_flipped_bit_is_noticed(opened):
    path = opened.path
    good = path.read_bytes()
    places = torch.randint(len(good), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for at in [*places, 0, 20, 127, 128, len(good) - 1, len(good) - 33, len(good) - 41]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1:])
        with pytest.raises(UserError, match="pruned.npy"):
            flipped = bank.load(path)
            for key in flipped.entries:
                flipped.read(key)


@pytest.mark.parametrize("length", [0, 100, 2000, -1])
def test_a_truncated_file_is_refused(opened, length):
    opened.path.write_bytes(opened.path.read_bytes()[:length])
    with pytest.raises(UserError, match="pruned.npy: is (empty|not a module bank of this toolkit, or is truncated)"):
        bank.load(opened.path)


def test_a_bank_that_could_not_be_finished_leaves_the_old_one(opened, variants):
    before = opened.path.read_bytes()
    with pytest.raises(KeyError), bank.create(opened.path, "", "", None, {}) as writer:
        writer.add(variants[0])
        raise KeyError("something")
    assert opened.path.read_bytes() == before and len(list(opened.path.parent.glob("*.npy*"))) == 1


def test_a_bank_of_another_model_is_refused_with_both_identities(opened):
    opened.check_origin("1" * 64, "m.pth")
    with pytest.raises(UserError, match=r"made from another model than m.pth \(bank: 1{12}…, model: 000000000000…"):
        opened.check_origin("0" * 64, "m.pth")


def test_missing_variants_are_named(opened):
    opened.check_serves({WI: 0.8})
    with pytest.raises(UserError, match=rf"(?s)lacks what .*{WI} at 0.33 \(the bank has 0.5; 0.8\)"):
        opened.check_serves({WI: 0.33})


def test_models_of_another_shape_are_refused(opened):
    with pytest.raises(UserError, match=r"the variant's shape \(48, 32\) is not the model's \(64, 32\)"):
        composition.compose(Model(small_network(d_ff=64), ""), opened, {WI: 0.5})
