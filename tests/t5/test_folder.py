"""A Hugging Face folder becomes the model that transformers makes of it, or is refused by the names of its weights."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune as torch_prune

from common.errors import UserError
from common.t5 import folder, model
from common.text import corpus
from tests.small import logits_of, save_folder, write_corpus

WI = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A small T5 as a Hugging Face folder; read-only."""
    path = tmp_path_factory.mktemp("saved") / "hub"
    save_folder(path)
    return path


@pytest.fixture
def hub(saved, tmp_path):
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "hub")


def logits(network):
    ids = torch.arange(3, 23).view(2, 10)
    return logits_of(network, ids, ids)


def same(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def theirs(path):
    """Return the network that transformers makes of a folder."""
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()


def load(path):
    return folder.load_folder(path, "en", "de")


def change(path, **values):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def state_of(hub):
    """Return the tensors of a folder, each name that is tied too, and take their file away."""
    network = theirs(hub)
    (hub / "model.safetensors").unlink()
    return {name: t.clone() for name, t in network.state_dict().items()}


@pytest.mark.parametrize(("kind", "changes"), [
    ("t5", {}), ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "untie": True}),
    ("mt5", {"untie": True}), ("mt5", {}), ("t5", {"num_decoder_layers": 1, "d_kv": 4}), ("t5", {"untie": True}),
], ids=str)
def test_loading_equals_transformers(tmp_path, kind, changes):
    network = save_folder(tmp_path / "hub", kind, **changes)
    loaded = load(tmp_path / "hub")
    assert same(logits(loaded.network), logits(network))
    assert same(logits(loaded.network), logits(theirs(tmp_path / "hub")))
    assert (loaded.network.lm_head.weight is loaded.network.shared.weight) == ("untie" not in changes)
    assert (loaded.source, loaded.target, loaded.prefix, loaded.masks) == ("en", "de", "", {})


def test_languages_are_those_asked_for(hub):
    loaded = folder.load_folder(hub, "fr", "cs")
    assert (loaded.source, loaded.target) == ("fr", "cs")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(hub, dtype):
    state = load_file(hub / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in state.items()}, hub / "model.safetensors")
    network = load(hub).network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert torch.equal(network.get_parameter(WI), state[WI].to(dtype).float())
    assert same(logits(network), logits(theirs(hub)))


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "parameters", "state_dict", "model_state_dict", "model"])
def test_a_bin_file_is_read(hub, form):
    expected = logits(theirs(hub))
    state = state_of(hub)
    if form == "parameters":
        state = {name: torch.nn.Parameter(t) for name, t in state.items()}
    content = {form: state, "epoch": 3} if form.endswith(("dict", "model")) else state
    torch.save(content, hub / "pytorch_model.bin", _use_new_zipfile_serialization=form != "before torch 1.6")
    assert same(logits(load(hub).network), expected)


def shard(hub, suffix):
    """Divide a folder's weights into two files with an index."""
    state = load_file(hub / "model.safetensors")
    (hub / "model.safetensors").unlink()
    stem, places = suffix.partition(".")[0], {}
    for n in (1, 2):
        name = f"{stem}-0000{n}-of-00002.{suffix.partition('.')[2]}"
        part = dict(list(state.items())[n - 1::2])
        save_file(part, hub / name) if "safe" in suffix else torch.save(part, hub / name)
        places |= dict.fromkeys(part, name)
    (hub / f"{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_put_together(hub, saved, suffix):
    shard(hub, suffix)
    assert same(logits(load(hub).network), logits(theirs(saved)))


def test_a_shard_that_is_not_there_is_named(hub):
    shard(hub, "model.safetensors")
    (hub / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: no such file"):
        load(hub)


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "..", 3, None, ["x"], ""])
def test_a_shard_outside_the_folder_is_refused(hub, place):
    places = shard(hub, "model.safetensors")
    shutil.copy(hub / "model-00002-of-00002.safetensors", hub.parent / "x.safetensors")
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places | {WI: place}}))
    with pytest.raises(UserError, match="is not {weight: file in this folder}|is not a file"):
        load(hub)


@pytest.mark.parametrize("rename", [
    "_orig_mod.{}".format, "module.{}".format, "module._orig_mod.{}".format, "_orig_mod.module.module.{}".format,
    "model.{}".format, lambda n: n.replace("block.0.", "block.0._orig_mod."),
    lambda n: n.replace("encoder.", "_fsdp_wrapped_module.encoder._checkpoint_wrapped_module.")],
    ids=["compile", "parallel", "both", "stacked", "Lightning", "inner", "FSDP"])
def test_wrappers_in_names_are_understood(hub, saved, rename):
    save_file({rename(name): t for name, t in load_file(hub / "model.safetensors").items()}, hub / "model.safetensors")
    assert same(logits(load(hub).network), logits(theirs(saved)))


def test_a_pruned_network_of_torch_is_read_with_its_masks_applied(hub):
    network = theirs(hub)
    pruned = [network.encoder.block[0].layer[1].DenseReluDense.wi, network.decoder.block[1].layer[0].SelfAttention.o]
    for module in pruned:
        torch_prune.l1_unstructured(module, "weight", 0.5)
    (hub / "model.safetensors").unlink()
    torch.save(network.state_dict(), hub / "pytorch_model.bin")
    loaded = load(hub).network
    assert same(logits(loaded), logits(network))
    assert int((loaded.get_parameter(WI) == 0).sum()) == pruned[0].weight.numel() // 2


EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("there", [EMBEDDINGS[:1], EMBEDDINGS[1:2], EMBEDDINGS[2:], EMBEDDINGS[3:], EMBEDDINGS[:3],
                                   EMBEDDINGS, EMBEDDINGS[1:]], ids=" ".join)
@pytest.mark.parametrize("other", [None, "lm_head.weight", "decoder.embed_tokens.weight"])
def test_embeddings_are_tied_as_in_transformers(hub, there, other):
    state = state_of(hub)
    for name in set(EMBEDDINGS) - set(there):
        del state[name]
    if other in there:
        state[other] += 1
    save_file(state, hub / "model.safetensors", metadata={"format": "pt"})
    ours, reference = load(hub).network, theirs(hub)
    assert same(logits(ours), logits(reference))
    assert len(list(ours.parameters())) == len(list(reference.parameters()))


def test_the_surplus_bias_of_old_files_is_accepted(hub, saved):
    save_file(load_file(hub / "model.safetensors") | {BIAS: torch.ones(32, 4)}, hub / "model.safetensors")
    assert same(logits(load(hub).network), logits(theirs(saved)))


def rename(state, old, new):
    return {(new if name == old else name): t for name, t in state.items()}


@pytest.mark.parametrize(("edit", "complaint"), [
    (lambda s: {n: t for n, t in s.items() if n != WI}, f"1 missing: {WI}$"),
    (lambda s: s | {WI: torch.zeros(7, 32)}, rf"1 of another shape: {WI} is \(7, 32\) and should be \(48, 32\)$"),
    (lambda s: s | {"extra.weight": torch.zeros(1)}, "1 surplus: extra.weight$"),
    (lambda s: {n: t for n, t in s.items() if not n.startswith("decoder")},
     "28 missing: decoder.block.0.layer.0.SelfAttention.q.weight, .*, …$"),
    (lambda s: {}, "47 missing: shared.weight, encoder.block.0"),
    (lambda s: rename(s, WI, WI + "_orig"), rf"1 missing: {WI}\n.*1 surplus: {WI}_orig$"),
    (lambda s: rename(s, WI, WI + "_orig") | {WI + "_mask": torch.ones(48)},
     rf"1 missing: {WI}\n.*2 surplus: {WI}_(mask|orig), "),
    (lambda s: s | {f"module.{WI}": s[WI] + 1}, f"has the weight '{WI}' a second time"),
    (lambda s: s | {WI: torch.zeros(48, 32, dtype=torch.int8)}, f"no weights in float32, float16 or bfloat16: {WI}$"),
    (lambda s: s | {WI: torch.full((48, 32), float("nan"))}, f"weights that are not finite: {WI}"),
    (lambda s: {f"base.{n}": t for n, t in s.items()}, r"47 missing: .*\n.*47 surplus: base\."),
], ids=["missing", "shape", "surplus", "encoder alone", "empty", "no mask", "odd mask", "twice", "int8", "nan",
        "named otherwise"])
@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_do_not_fit_are_named(hub, edit, complaint, suffix):
    state = edit(load_file(hub / "model.safetensors"))
    (hub / "model.safetensors").unlink()
    save_file(state, hub / suffix) if "safe" in suffix else torch.save(state, hub / suffix)
    with pytest.raises(UserError, match=complaint):
        load(hub)


def test_a_gated_checkpoint_whose_configuration_does_not_say_so_is_refused(tmp_path):
    save_folder(tmp_path / "hub", feed_forward_proj="gated-gelu")
    change(tmp_path / "hub" / "config.json", feed_forward_proj=None, dense_act_fn=None, is_gated_act=None)
    with pytest.raises(UserError, match=r"4 missing: \S+\.wi\.weight, .*\n.*8 surplus: \S+\.wi_0\.weight"):
        load(tmp_path / "hub")


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"num_layers": 1}, r"8 surplus: encoder\.block\.1"),
    ({"num_decoder_layers": 1}, r"13 surplus: decoder\.block\.1"),
    ({"num_layers": 200}, r"1584 missing: encoder\.block\.2"),
    ({"d_ff": 24}, r"of another shape: \S+wi\.weight is \(48, 32\) and should be \(24, 32\)"),
    ({"vocab_size": 299}, r"of another shape: shared\.weight is \(300, 32\) and should be \(299, 32\)"),
])
def test_weights_of_another_configuration_are_refused(hub, changes, complaint):
    change(hub / "config.json", **changes)
    with pytest.raises(UserError, match=complaint):
        load(hub)


def test_a_relative_bias_in_every_layer_is_no_t5(hub):
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    config = json.loads((hub / "config.json").read_text())
    UMT5ForConditionalGeneration(UMT5Config(**config | {"model_type": "umt5"})).save_pretrained(hub)
    with pytest.raises(UserError, match="is a 'umt5' model; this toolkit prunes the T5 family"):
        load(hub)
    (hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"2 surplus: \S+\.1\.layer\.0\.SelfAttention.relative_attention"):
        load(hub)


@pytest.mark.parametrize(("name", "data", "complaint"), [
    ("model.safetensors", None, "has no weights: none of model.safetensors, pytorch_model.bin, nor their .index.json"),
    ("model.safetensors", b"", "model.safetensors: is empty"),
    ("model.safetensors", b"x" * 5000, "model.safetensors: its weights cannot be read; nothing in it was run"),
    ("config.json", None, "config.json: no such file"), ("config.json", b"{", "config.json: is not valid JSON"),
    ("config.json", b"[]", "config.json: is no configuration"),
    ("config.json", b'{"model_type": "bert"}', "is a 'bert' model"),
    ("generation_config.json", b"[]", "generation_config.json: is no configuration"),
    ("generation_config.json", b"{", "generation_config.json: is not valid JSON"),
    ("tokenizer.json", None, "has neither tokenizer.json nor spiece.model"),
])
def test_a_file_that_is_missing_or_broken_is_named(hub, name, data, complaint):
    (hub / name).unlink(missing_ok=True)
    if data is not None:
        (hub / name).write_bytes(data)
    with pytest.raises(UserError, match=complaint):
        load(hub)


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_does_not_run(hub, zipped):
    (hub / "model.safetensors").unlink()
    value = {WI: Hostile(hub / "hacked")}
    torch.save(value, hub / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="pytorch_model.bin: its weights cannot be read; nothing in it was run"):
        load(hub)
    assert not (hub / "hacked").exists()
    pickle.loads(pickle.dumps(value))[WI].close()
    assert (hub / "hacked").exists()  # the pickle of this test is hostile


def test_a_tensor_that_claims_more_numbers_than_it_has_is_refused(hub):
    state = state_of(hub)
    torch.save(state | {WI: torch.zeros(1).expand(48, 32)}, hub / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"no weights in float32, float16 or bfloat16: {WI}"):
        load(hub)


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"auto_map": {"x": "y"}}, "foreign code"), ({"quantization_config": {"quant_method": "x"}}, "foreign code"),
    ({"task_specific_params": [1]}, "task_specific_params"), ({"num_layers": 10**9}, "num_layers = 10+, allowed"),
    ({"prefix": 3}, "prefix = 3, which is no text"), ({"feed_forward_proj": "a-b-c"}, "not an activation"),
])
def test_a_configuration_that_asks_for_too_much_is_refused(hub, changes, complaint):
    change(hub / "config.json", **changes)
    with pytest.raises(UserError, match=complaint):
        load(hub)


def test_keys_that_say_nothing_of_the_network_are_not_looked_at(hub, saved):
    change(hub / "config.json", attn_implementation="somebody/kernels", num_labels=10**9, architectures=3)
    assert torch.equal(logits(load(hub).network), logits(load(saved).network))


def test_json_without_end_is_not_read(hub, monkeypatch):
    monkeypatch.setattr("common.files.jsonfile.MAX_JSON_BYTES", 1 << 20)
    (hub / "generation_config.json").write_text("{" + " " * (1 << 20) + "}")
    with pytest.raises(UserError, match="generation_config.json: JSON of more than 1 MiB is not read"):
        load(hub)


@pytest.mark.parametrize(("changes", "prefix"), [
    ({}, ""), ({"prefix": "every: "}, "every: "),
    ({"task_specific_params": {"translation_en_to_de": {"prefix": "pair: "}}}, "pair: "),
    ({"prefix": "every: ", "task_specific_params": {"translation_en_to_de": {"prefix": "pair: "}}}, "pair: "),
    ({"prefix": "every: ", "task_specific_params": {"translation_en_to_fr": {"prefix": "fr: "}}}, "every: "),
    ({"prefix": "every: ", "task_specific_params": {"translation_en_to_de": {"max_length": 9}}}, "every: "),
])
def test_the_prefix_is_that_of_the_languages_else_of_the_model(hub, changes, prefix):
    change(hub / "config.json", **changes)
    assert load(hub).prefix == prefix


@pytest.mark.parametrize(("kind", "config", "generation", "expected"), [
    ("t5", {}, {}, (0, 1, 0)), ("t5", {}, {"decoder_start_token_id": 5}, (5, 1, 0)),
    ("mt5", {}, {"decoder_start_token_id": 5}, (5, 1, 0)), ("t5", {"pad_token_id": 3}, {}, (3, 1, 3)),
    ("t5", {"decoder_start_token_id": 5}, {"decoder_start_token_id": 5, "eos_token_id": [4]}, (5, 4, 0)),
    ("t5", {}, {"eos_token_id": 4, "pad_token_id": 3}, (3, 4, 3)),
])
def test_token_ids_may_stand_in_the_generation_configuration_alone(tmp_path, kind, config, generation, expected):
    save_folder(tmp_path / "hub", kind)
    keys = dict.fromkeys(("decoder_start_token_id", "eos_token_id", "pad_token_id"))
    change(tmp_path / "hub" / "config.json", **keys | config)
    (tmp_path / "hub" / "generation_config.json").write_text(json.dumps(generation))
    found = load(tmp_path / "hub").network.config
    assert (found.decoder_start_token_id, found.eos_token_id, found.pad_token_id) == expected


def test_token_ids_that_contradict_each_other_are_refused(hub):
    change(hub / "generation_config.json", decoder_start_token_id=5, eos_token_id=[1, 6])
    with pytest.raises(UserError, match=r"decoder_start_token_id is 5, and 0 in config.json; make them equal\n"
                                        r".*eos_token_id is \[1, 6\], and 1 in config.json"):
        load(hub)


def test_a_byte_order_mark_before_every_json_file_changes_nothing(hub, saved):
    shard(hub, "model.safetensors")
    for path in hub.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ours, plain = load(hub), load(saved)
    assert same(logits(ours.network), logits(plain.network))
    assert ours.tokenizer_json == plain.tokenizer_json


@pytest.fixture
def cache(saved, tmp_path, monkeypatch):
    """The hub's cache with one model, and no network."""
    import httpx2
    import huggingface_hub

    def fail(*_, **__):
        raise httpx2.ConnectError("no route to host")

    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "cache" / "models--somebody--t5"
    shutil.copytree(saved, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    return place / "snapshots" / commit


def test_a_model_in_the_cache_needs_no_network_and_its_commit_is_recorded(cache, saved, tmp_path, stage):
    assert folder.fetch("somebody/t5") == (cache, cache.name)
    result = stage("download_model", "-m", "somebody/t5", "-o", tmp_path / "m.pth")
    assert result.code == 0, result.err
    loaded = model.load(tmp_path / "m.pth")
    assert loaded.provenance["arguments"]["hub_commit"] == cache.name
    assert same(logits(loaded.network), logits(theirs(saved)))


def test_a_model_in_the_cache_is_used_whatever_stops_the_hub(cache, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("a proxy that says no")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    assert folder.fetch("somebody/t5")[0] == cache


def test_a_cached_model_with_a_bin_file_alone_is_found(cache, saved):
    state = state_of(cache)
    torch.save(state, cache / "pytorch_model.bin")
    path, _ = folder.fetch("somebody/t5")
    assert same(logits(load(path).network), logits(theirs(saved)))


def test_no_network_is_one_sentence_with_the_ways_out(cache, stage, tmp_path):
    result = stage("download_model", "-m", "google/flan-t5-small", "-o", tmp_path / "m.pth")
    assert result.code == 2 and "Traceback" not in result.err and not (tmp_path / "m.pth").exists()
    assert "google/flan-t5-small: is no folder here and cannot be downloaded from the hub" in result.err
    assert "no route to host" in result.err and "give a local folder, -m demo" in result.err


@pytest.mark.parametrize(("name", "complaint"), [
    ("./none", "none: no such folder"), ("a/b/c", "a/b/c: no such folder"), ("~/x", "no such folder"),
    (__file__, "is a file; a Hugging Face model is a folder")])
def test_a_name_that_is_no_folder_does_not_reach_the_hub(cache, name, complaint):
    with pytest.raises(UserError, match=complaint):
        folder.fetch(name)


def test_demo_is_the_model_of_the_repository(tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    assert folder.fetch("demo") == (corpus.DEMO / "model", None)
    assert stage("download_model", "-m", "demo", "-o", "m.pth").code == 0
    loaded = model.load(tmp_path / "m.pth")
    assert same(logits(loaded.network), logits(theirs(corpus.DEMO / "model")))
    assert loaded.provenance["arguments"]["hub_commit"] is None


def test_tiny_needs_no_hub_and_translates_its_tokens_back(tmp_path, stage):
    write_corpus(tmp_path / "text")
    for path in (tmp_path / "text").glob("*.de"):
        path.rename(path.with_suffix(".cs"))
    result = stage("download_model", "-m", "tiny", "--target", "cs", "--data", tmp_path / "text", "-o",
                   tmp_path / "t.pth")
    assert result.code == 0, result.err
    loaded = model.load(tmp_path / "t.pth")
    sentence = (tmp_path / "text" / "val.cs").read_text(encoding="utf-8").splitlines()[0]
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(sentence).ids) == sentence
    assert (loaded.source, loaded.target) == ("en", "cs")
    assert loaded.network.config.vocab_size == loaded.tokenizer.get_vocab_size()


def test_a_byt5_needs_no_tokenizer_file(tmp_path, stage):
    from transformers import ByT5Tokenizer

    network = save_folder(tmp_path / "hub", vocab_size=384, feed_forward_proj="gated-gelu", num_layers=3)
    (tmp_path / "hub" / "tokenizer.json").unlink()
    change(tmp_path / "hub" / "config.json", tokenizer_class="ByT5Tokenizer")
    result = stage("download_model", "-m", tmp_path / "hub", "-o", tmp_path / "m.pth")
    assert result.code == 0, result.err
    loaded = model.load(tmp_path / "m.pth")
    assert same(logits(loaded.network), logits(network))
    sentence = "Ein Mädchen läuft über Öl."
    ids = loaded.tokenizer.encode(sentence).ids
    assert ids == ByT5Tokenizer()(sentence).input_ids and loaded.tokenizer.decode([0, *ids]) == sentence
