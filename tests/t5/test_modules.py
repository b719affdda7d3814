from common.t5 import modules
from tests.small import small_network


def test_kinds_and_blocks():
    attention = "decoder.block.11.layer.1.EncDecAttention"
    assert modules.kind_of(attention) == "attention"
    assert modules.kind_of(f"{attention}.o") == "linear"
    assert modules.kind_of("encoder.block.0.layer.1.DenseReluDense.wi_1") == "linear"
    for never in ("shared", "lm_head", f"{attention}.q", "encoder.block.0.layer.0.layer_norm",
                  "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", f"x{attention}", f"{attention} "):
        assert modules.kind_of(never) is None
    assert modules.parent_of(f"{attention}.o") == attention and modules.parent_of(attention) is None
    assert modules.is_block(attention) and not modules.is_block(f"{attention}.o")
    assert modules.members(attention) == (attention, f"{attention}.o")
    assert modules.weight_names(attention) == tuple(f"{attention}.{part}.weight" for part in "qkvo")


def test_prunable_lists_every_module_once_in_model_order():
    kinds = modules.prunable(small_network())
    # 2 encoder layers with 1 attention, 2 decoder layers with 2; each attention has an o, each feed-forward wi and wo.
    assert len(kinds) == 6 * 2 + 4 * 3
    assert list(kinds)[:5] == ["encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.0.SelfAttention.o",
                               "encoder.block.0.layer.1.DenseReluDense", "encoder.block.0.layer.1.DenseReluDense.wi",
                               "encoder.block.0.layer.1.DenseReluDense.wo"]
    assert len(modules.prunable(small_network("mt5"))) == 6 * 2 + 4 * 4  # wi_0 and wi_1
