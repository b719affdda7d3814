import numpy as np
import pytest
import torch

from common import bank, composition, models
from common.configs import make_scheme, read_configurations, scheme_digest
from common.files import UserError


def test_variants_read_back_equal(made, origin):
    opened = bank.load(made / "pruned.npy")
    for block, rates in opened.entries:
        fresh, read = next(composition.prune_block(origin.network, block, [rates])), opened.read((block, rates))
        assert fresh.weights.keys() == read.weights.keys()
        for name in fresh.weights:
            assert torch.equal(fresh.weights[name], read.weights[name])
            assert torch.equal(fresh.masks[name], read.masks[name])


def test_numpy_reads_it_with_its_defaults(made):
    array = np.load(made / "pruned.npy", mmap_mode="r")
    assert array.dtype == np.uint8 and array.ndim == 1


def test_the_file_is_as_small_as_its_sparsity_says(made):
    opened = bank.load(made / "pruned.npy")
    kept = sum(t["kept"] for e in opened.entries.values() for t in e["tensors"].values())
    size = sum(np.prod(t["shape"]) for e in opened.entries.values() for t in e["tensors"].values())
    data = sum(e["bytes"] for e in opened.entries.values())
    assert data == 4 * kept + size // 8


def test_it_names_scheme_and_model(made, origin):
    opened = bank.load(made / "pruned.npy")
    assert opened.origin == origin.identity
    assert opened.scheme == scheme_digest(make_scheme(read_configurations(made / "conf.json")))


def test_every_flipped_bit_is_noticed(work):
    path = work / "pruned.npy"
    good = path.read_bytes()
    places = torch.randint(len(good), (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in [*places, 0, 20, 127, 128, len(good) - 1, len(good) - 33, len(good) - 41]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1:])
        with pytest.raises(UserError, match="pruned.npy"):
            opened = bank.load(path)
            for key in opened.entries:
                opened.read(key)


def test_a_bank_of_another_model_is_refused_with_both_identities(made):
    with pytest.raises(UserError, match=r"made from another model than m.pth \(bank: \w{12}…, model: 000000000000…"):
        bank.load(made / "pruned.npy").check_origin("0" * 64, "m.pth")


def test_missing_variants_are_named(made):
    with pytest.raises(UserError, match=r"(?s)lacks what .*encoder.block.0.layer.1.DenseReluDense.wi at 0.33"):
        bank.load(made / "pruned.npy").check_serves({"encoder.block.0.layer.1.DenseReluDense.wi": 0.33})


def test_models_of_another_shape_are_refused(made, tmp_path):
    from tests.conftest import make_tokenizer, save_folder

    other = models.Model(save_folder(tmp_path / "hub", d_ff=64), make_tokenizer().to_str())
    opened = bank.load(made / "pruned.npy")
    with pytest.raises(UserError, match="the variant's shape"):
        composition.compose(other, opened, read_configurations(made / "conf.json")[0])
