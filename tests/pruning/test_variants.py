import pytest
import torch

from common.errors import UserError
from common.pruning import composition
from common.pruning.configurations import uniform
from common.pruning.criteria import head_order, head_pairs, magnitude_mask, obs_masks, removed_count
from common.pruning.variants import heads_present, prune_block, prune_scheme, prune_scheme_by_obs
from common.t5.model import Model
from common.t5.modules import prunable
from tests.small import Text, scheme_of, seen_by_hooks, small_network, write_bank

ATTENTION = "decoder.block.1.layer.1.EncDecAttention"
WI, WO = (f"encoder.block.1.layer.1.DenseReluDense.{part}" for part in ("wi", "wo"))


def test_only_o_is_in_a_variant_without_removed_heads():
    assert list(next(prune_block(Model(small_network(), ""), ATTENTION, [(0.0, 0.5)])).weights) == [
        f"{ATTENTION}.o.weight"]


def test_variants_are_the_original_inside_their_masks_and_leave_it_alone():
    model = Model(small_network(), "")
    for variant in prune_scheme(model, scheme_of(model.network, (0.25, 0.5), (0.5, 0.0))):
        for name, mask in variant.masks.items():
            assert torch.equal(variant.weights[name], torch.where(mask, model.network.get_parameter(name), 0.0))
    assert not model.masks
    for a, b in zip(model.network.parameters(), small_network().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_obs_chooses_by_the_moments_of_what_the_modules_receive(kind):
    network, text = small_network(kind), Text()
    found = {v.key: v for v in prune_scheme_by_obs(Model(network, ""), scheme_of(network, (0.5, 0.5), (0.0, 0.3)), text,
                                                   "cpu")}
    linear = [name for name, of in prunable(network).items() if of == "linear"]
    grams = {n: x.double().T @ x.double() / len(x) for n, (x, _) in seen_by_hooks(network, text, linear).items()}
    assert len(found) == 2 * (6 + sum(not n.endswith(".o") for n in linear))
    for name in (n for n in linear if not n.endswith(".o")):
        w = network.get_parameter(f"{name}.weight").detach()
        expected = obs_masks(w, [0.5, 0.3], grams[name], w == w, torch.ones(w.shape[1]).bool())
        for rate, mask in zip((0.5, 0.3), expected, strict=True):
            assert (found[name, (rate,)].masks[f"{name}.weight"] != mask).float().mean() < 0.05, name  # near ties
    w = network.get_parameter(f"{ATTENTION}.o.weight").detach()
    heads = torch.ones(4, dtype=torch.bool)
    heads[head_order(head_pairs(w, grams[f"{ATTENTION}.o"], 4))[:2]] = False
    heads = heads.repeat_interleave(8)
    variant = found[ATTENTION, (0.5, 0.5)]
    assert torch.equal(variant.masks[f"{ATTENTION}.k.weight"], heads[:, None].expand(32, 32))
    assert not variant.masks[f"{ATTENTION}.o.weight"][:, ~heads].any()
    assert int(variant.masks[f"{ATTENTION}.o.weight"].sum()) == 32 * 32 // 2


@pytest.mark.parametrize("before", [{}, {0: 3}, {0: 3, 1: 2}])
def test_obs_removes_the_same_heads_from_the_self_attentions_of_a_stack(before):
    """The order of heads by hand: what all of a stack lose, after what some had lost before."""
    network, text = small_network(), Text()
    model = Model(network, "")
    for i, head in before.items():
        name = f"encoder.block.{i}.layer.0.SelfAttention"
        gone = torch.arange(4).repeat_interleave(8) == head
        for part in "qkv":
            model.masks[f"{name}.{part}.weight"] = ~gone[:, None].expand(32, 32)
        model.masks[f"{name}.o.weight"] = ~gone.expand(32, 32)
    with torch.no_grad():
        for name, mask in model.masks.items():
            network.get_parameter(name).mul_(mask)
    scheme = {name: [(0.25, 0.0), (0.5, 0.3)] for name, kind in prunable(network).items() if kind == "attention"}
    kept = {v.key: v.masks[f"{v.block}.o.weight"].any(dim=0).view(4, 8).any(dim=1)
            for v in prune_scheme_by_obs(model, scheme, text, "cpu")}
    grams = {n: x.double().T @ x.double() for n, (x, _) in
             seen_by_hooks(network, text, [f"{name}.o" for name in scheme]).items()}
    for side in ("encoder", "decoder"):
        names = [name for name in scheme if name.startswith(side) and name.endswith("SelfAttention")]
        order = head_order(sum(head_pairs(network.get_parameter(f"{n}.o.weight").detach(), grams[f"{n}.o"], 4)
                               for n in names))
        for i, name in enumerate(names):
            gone = before.get(i, -1) if side == "encoder" else -1
            left = [h for h in order if h != gone]
            assert set((~kept[name, (0.25, 0.0)]).nonzero()[:, 0].tolist()) == {*left[:1], gone} - {-1}
            assert set((~kept[name, (0.5, 0.3)]).nonzero()[:, 0].tolist()) == {*left[:2], gone} - {-1}


def test_an_activation_that_is_not_finite_is_named_by_its_block():
    network = small_network()
    with torch.no_grad():
        network.encoder.block[1].layer[1].layer_norm.weight[3] = float("inf")
    made = prune_scheme_by_obs(Model(network, ""), {WI: [(0.5,)], WO: [(0.5,)]}, Text(), "cpu")
    with pytest.raises(UserError, match=f"{WI}: its input is not finite"):
        next(made)


@pytest.fixture(params=["l1", "obs"])
def again(request, tmp_path):
    """8 heads; a model whose heads are halved and weights pruned by 0.6, and its variants of a second round."""
    model, text = Model(small_network(num_heads=8, d_kv=4), ""), Text()
    first = write_bank(tmp_path / "1.npy", prune_scheme(model, scheme_of(model.network, (0.5, 0.6))))
    composition.compose(model, first, uniform(prunable(model.network), 0.5, 0.6))
    scheme = scheme_of(model.network, (0.5, 0.5), (0.0, 0.1), (0.25, 0.0))
    made = prune_scheme(model, scheme) if request.param == "l1" else prune_scheme_by_obs(model, scheme, text, "cpu")
    return model, list(made)


def test_rates_of_a_second_round_count_what_is_there(again):
    model, second = again
    for variant in second:
        if not variant.block.endswith("Attention"):
            name = f"{variant.block}.weight"
            there = int(model.masks[name].sum())
            removed = {0.5: there // 2, 0.1: there // 10}[variant.rates[0]]
            assert abs(int(variant.masks[name].sum()) - (there - removed)) <= 1  # halves round up
            continue
        heads = {0.5: 2, 0.25: 3, 0.0: 4}[variant.rates[0]]  # of the 4 that are left of 8
        after = Model(model.network, "", masks=model.masks | variant.masks)
        assert int(heads_present(after, variant.block).sum()) == heads
        columns = variant.masks[f"{variant.block}.o.weight"].any(dim=0).view(8, 4).any(dim=1)
        assert torch.equal(columns, heads_present(after, variant.block))


def test_an_o_alone_counts_the_weights_that_are_left(again):
    model, second = again
    for variant in second:
        if variant.rates == (0.0, 0.1):
            there = int(model.masks[f"{variant.block}.o.weight"].sum())
            kept = int(variant.masks[f"{variant.block}.o.weight"].sum())
            assert abs(kept - 0.9 * there) <= 1 and list(variant.masks) == [f"{variant.block}.o.weight"]


def test_a_rate_that_removes_all_heads_that_are_left_is_refused(again):
    model, _ = again
    with pytest.raises(UserError, match=rf"^{ATTENTION}: pruning rate 0.9 removes all 4 heads"):
        next(prune_block(model, ATTENTION, [(0.9, 0.0)]))


def test_one_head_can_lose_weights_but_not_itself():
    model = Model(small_network(num_heads=1), "")
    kept = next(prune_block(model, ATTENTION, [(0.25, 0.5)])).masks
    assert kept[f"{ATTENTION}.q.weight"].all() and int(kept[f"{ATTENTION}.o.weight"].sum()) == 8 * 32 // 2


@pytest.mark.parametrize("changes", [{"d_ff": 1}, {"d_model": 1, "d_kv": 1}])
def test_one_unit_and_one_token_of_text_are_enough(changes):
    model, text = Model(small_network(**changes), ""), Text(pairs=1, longest=1)
    scheme = scheme_of(model.network, (0.5, 0.4))
    for made in (prune_scheme(model, scheme), prune_scheme_by_obs(model, scheme, text, "cpu")):
        for variant in made:
            for name, mask in variant.masks.items():
                removed = mask.numel() - int(mask.sum())
                if name.endswith("o.weight"):
                    assert removed >= removed_count(0.4, mask.numel())
                else:
                    assert removed == removed_count(0.5 if name[-8] in "qkv" else 0.4, mask.numel()), name


def test_obs_prunes_a_block_whose_inputs_are_all_off():
    network = small_network()
    with torch.no_grad():
        network.get_parameter(f"{WI}.weight").zero_()
        network.get_parameter(f"{ATTENTION}.v.weight").zero_()
    found = {v.block: v for v in prune_scheme_by_obs(Model(network, ""), scheme_of(network, (0.5, 0.5)), Text(), "cpu")}
    wo = network.get_parameter(f"{WO}.weight").detach()
    assert torch.equal(found[WO].masks[f"{WO}.weight"], magnitude_mask(wo, 0.5))
    assert int(found[ATTENTION].masks[f"{ATTENTION}.q.weight"].sum()) == 2 * 8 * 32
