"""What other programs load from a folder translates as the model does."""

import json
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from common.export import folder as export
from common.t5.model import Model
from common.t5.shrink import used
from common.text.batches import Batches
from common.text.translation import translate
from tests.small import demo_pairs, make_tokenizer
from tests.t5.test_shrink import empty_some, network_of

PAIRS = demo_pairs("val")[:20]
IDS = {"vocab_size": 310, "decoder_start_token_id": 0}  # ten more than the tokenizer has


def model_of(name: str = "t5", seed: int | None = 0, tied: bool = False, **changes) -> Model:
    """Return a model, some of it empty if there is a seed. Tied, it would say nothing but the start token."""
    network = network_of(name, **IDS | changes)
    if not tied:
        torch.manual_seed(5)
        network.lm_head.weight = torch.nn.Parameter(torch.randn_like(network.lm_head.weight))
    network.config.num_layers = 3  # see `shrink`
    if seed is not None:
        empty_some(network, ["some", "all", "none", "one", "some", *["some"] * 8], seed)
    return Model(network, make_tokenizer().to_str(), "say: ", provenance={"stage": "x.py"})


def expected(model: Model) -> list[str]:
    return translate(model, Batches(PAIRS, model), "cpu", max_new_tokens=export.CHECK_TOKENS).texts


def made(folder, model: Model, kind: str = "hf", quantization: str = "float32") -> list[str]:
    export.write(folder, model, kind, quantization, "name")
    return export.translations(folder, model, kind, [source for source, _ in PAIRS], "cpu")


@pytest.mark.parametrize("kind", ["hf", "ctranslate2"])
@pytest.mark.parametrize(("name", "changes"), [("t5", {}), ("gated", {"dense_act_fn": "gelu"}), ("mt5", {}),
                                               ("t5", {"layer_norm_epsilon": 0.5})])
def test_translations_are_the_models(tmp_path, kind, name, changes):
    if kind == "ctranslate2":
        pytest.importorskip("ctranslate2")
    model = model_of(name, **changes)
    texts = expected(model)
    assert made(tmp_path, model, kind) == texts == expected(model) and len(set(texts)) > 10


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("name", ["t5", "gated", "mt5"])
def test_ctranslate2_gives_the_models_probabilities(tmp_path, name, seed):
    ctranslate2 = pytest.importorskip("ctranslate2")
    model = model_of(name, seed, tied=name != "gated")
    export.write(tmp_path, model, "ctranslate2", "float32", "name")
    tokenizer = model.tokenizer
    pairs = [tuple(tokenizer.encode(text) for text in pair) for pair in PAIRS[:6]]
    scored = ctranslate2.Translator(str(tmp_path)).score_batch([s.tokens for s, _ in pairs], [
        t.tokens[:-1] for _, t in pairs])  # it puts the end there itself
    for (source, target), found in zip(pairs, scored, strict=True):
        with torch.no_grad():
            logits = model.network(torch.tensor([source.ids]), torch.tensor([[0, *target.ids[:-1]]]))[0]
        wanted = logits.log_softmax(dim=-1).gather(1, torch.tensor(target.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(found.log_probs), wanted, rtol=1e-3, atol=1e-4)


def test_a_folder_loads_without_code_and_says_how(tmp_path):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    model = model_of()
    assert export.write(tmp_path, model, "hf", "float32", "a/name")[0] == "UMT5ForConditionalGeneration"
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert "auto_map" not in config.to_dict() and config.prefix == "say: "
    given = loaded.generation_config.to_dict()
    assert [given[key] for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "max_new_tokens")] == [
        0, 1, 0, 512]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "</s>", "<unk>")
    assert list(tokenizer("A man.")) == ["input_ids", "attention_mask"]
    card = (tmp_path / "README.md").read_text()
    assert all(part in card for part in ("language: [en, de]", 'from_pretrained("a/name")', "say: ", "made by x.py"))


@pytest.mark.parametrize("kind", ["hf", "ctranslate2"])
def test_the_code_of_the_card_runs(tmp_path, monkeypatch, capsys, kind):
    if kind == "ctranslate2":
        pytest.importorskip("ctranslate2")
    (tmp_path / "name").mkdir()
    model = model_of(seed=None, vocab_size=300)
    export.write(tmp_path / "name", model, kind, "float32", "name")
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "name" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("…", "A man runs."), {})
    text, = export.translations(tmp_path / "name", model, kind, ["A man runs."], "cpu")
    assert text and capsys.readouterr().out.startswith(text)


def test_a_tokenizer_without_an_end_token_gets_it(tmp_path):
    from tokenizers import Tokenizer, processors

    bare = make_tokenizer()
    bare.post_processor = processors.Sequence([])
    model = replace(model_of(), tokenizer_json=bare.to_str())
    assert made(tmp_path, model) == expected(model)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("A man").tokens[-1] == "</s>"


@pytest.mark.parametrize(("kind", "quantization"), [
    ("hf", "float16"), ("hf", "bfloat16"), ("ctranslate2", "float16"), ("ctranslate2", "int8")])
def test_rounded_weights_are_smaller_and_the_model_keeps_its_own(tmp_path, kind, quantization):
    if kind == "ctranslate2":
        pytest.importorskip("ctranslate2")
    model = model_of()
    before = [p.clone() for p in model.network.parameters()]
    sizes = []
    for q in ("float32", quantization):
        (tmp_path / q).mkdir()
        made(tmp_path / q, model, kind, q)
        sizes.append((tmp_path / q / ("model.safetensors" if kind == "hf" else "model.bin")).stat().st_size)
    assert sizes[1] < 0.62 * sizes[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.network.parameters(), strict=True))


def test_an_activation_that_ctranslate2_lacks_is_refused(tmp_path):
    pytest.importorskip("ctranslate2")
    with pytest.raises(UserError, match="CTranslate2 does not know the model's activation sigmoid; --format hf does"):
        export.write(tmp_path, model_of(dense_act_fn="sigmoid"), "ctranslate2", "float32", "name")


def test_ctranslate2_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ctranslate2", None)
    with pytest.raises(UserError, match="the package ctranslate2 is not installed; run pip install 'ctranslate2>=4.8"):
        export.import_ctranslate2()


def test_the_pattern_has_heads_that_differ_between_layers():
    left = used(model_of().network)
    own = [m.tolist() for name, m in left.items() if name.startswith("decoder") and name.endswith("SelfAttention")]
    assert len({json.dumps(m) for m in own}) > 1
