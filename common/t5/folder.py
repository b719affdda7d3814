"""Where models come from: the Hugging Face hub, a local folder, or a small fresh T5 for offline use."""

import json
import sys
import zipfile
from pathlib import Path

import torch

from common.errors import UserError, brief, reason, refuse
from common.files.atomic import check_inputs
from common.files.jsonfile import read_json
from common.t5.model import Model
from common.t5.network import TIED, build_network, initialize
from common.t5.tokenizer import read_tokenizer
from common.text.corpus import DEMO, Corpus, read_pairs

# Two layers each side learn the demo corpus in about two minutes on two cores (README, 'Quick start').
TINY = {"model_type": "t5", "d_model": 128, "d_kv": 16, "d_ff": 512, "num_heads": 8, "num_layers": 2,
        "num_decoder_layers": 2, "dropout_rate": 0.1, "feed_forward_proj": "relu", "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0}
TINY_VOCABULARY = 700  # on the demo text 1.0 M weights; data/demo/README.md has the scores

_TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = {"model.safetensors": "model-*.safetensors", "pytorch_model.bin": "pytorch_model-*.bin"}  # whole: shards
# Around a network, torch.compile, DataParallel, Lightning, FSDP and checkpointed activations leave these in names.
_WRAPPERS = {"_orig_mod", "module", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The one surplus weight of T5 files: no T5 ever used it, and transformers leaves it out.
_SURPLUS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def fetch(name: str) -> tuple[Path, str | None]:
    """Return a local folder with the model, and the hub's commit if it is from there.

    ``name`` is a folder, "demo", or a hub repository, whose files are downloaded once. Without a network those that
    are in the cache are used.

    Raises:
        UserError: no such folder or repository, or no network.
    """
    folder = DEMO / "model" if name == "demo" else Path(name)
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise UserError(f"{name}: is a file; a Hugging Face model is a folder with config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import logging, snapshot_download

    logging.set_verbosity_error()
    print(f"asking the hub for {name}", file=sys.stderr)

    def snapshot(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # the hub client raises many kinds: no network, no repository, no permission
            try:
                return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
            except Exception:
                raise UserError(
                    f"{name}: is no folder here and cannot be downloaded from the hub ({type(error).__name__}: "
                    f"{reason(error)}); give a local folder, -m demo for the small model of this repository, or -m "
                    "tiny for one that is not trained yet") from None

    for whole, shards in _WEIGHTS.items():  # many repositories have both; one is enough
        folder = snapshot(*_TEXTS, whole, f"{whole}.index.json", shards)
        if (folder / whole).exists() or (folder / f"{whole}.index.json").exists():
            break
    return folder, folder.name


def load_folder(folder: Path, source: str, target: str) -> Model:
    """Read a Hugging Face T5 folder (safetensors, or a ``.bin`` read without running code) into a `Model`.

    Weights become float32. The prefix is the one the configuration gives for the language pair
    (``task_specific_params``), as the original T5 has, else the configuration's own ``prefix``.

    Raises:
        UserError: a file is missing or broken, it is no T5, or weights and configuration do not fit together.
    """
    config = read_config(folder)
    network = build_network(config, str(folder / "config.json"))
    network.load_state_dict(_fit(folder, network, _read_weights(folder)), assign=True)
    unfinished = [n for n, p in network.named_parameters() if not torch.isfinite(p).all()]
    if unfinished:
        raise UserError(f"{folder}: weights that are not finite: {', '.join(unfinished[:3])}")
    if network.config.decoder_start_token_id is None:
        network.config.decoder_start_token_id = network.config.pad_token_id
    task = (config.get("task_specific_params") or {}).get(f"translation_{source}_to_{target}") or {}
    prefix = task.get("prefix", config.get("prefix")) or ""
    if not isinstance(prefix, str):
        raise UserError(f"{folder / 'config.json'}: has prefix = {brief(prefix)}, which is no text")
    return Model(network.eval(), read_tokenizer(folder, config), prefix, source, target)


def read_config(folder: Path) -> dict:
    """Return ``config.json`` of a Hugging Face model folder, with the token ids of ``generation_config.json``.

    Raises:
        UserError: it is missing or broken, asks for foreign code, or the two contradict each other.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: is no configuration of a model")
    for key in ("auto_map", "quantization_config"):
        if config.get(key):  # its author's code, or a library's, makes another network of the same weights
            raise UserError(f"{path}: has {key}, which asks for foreign code; only plain T5 models are read")
    tasks = config.get("task_specific_params") or {}
    if not isinstance(tasks, dict) or not all(isinstance(t, dict) for t in tasks.values()):
        raise UserError(f"{path}: task_specific_params is not {{task: {{name: value}}}}")
    other = folder / "generation_config.json"
    generation = read_json(other) if other.exists() else {}
    if not isinstance(generation, dict):
        raise UserError(f"{other}: is no configuration")
    problems = []
    for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(key)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value is not None and config.get(key) is None:
            config[key] = value
        elif value is not None and value != config[key]:  # transformers trains with one and translates with the other
            problems.append(f"{key} is {brief(value)}, and {brief(config[key])} in config.json; make them equal")
    refuse(other, problems)
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's weight files by name, without the names of wrappers."""
    for whole in _WEIGHTS:
        index = folder / f"{whole}.index.json"
        if (folder / whole).exists():
            names = {whole}
        elif index.exists():
            content = read_json(index)
            parts = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(parts, dict) or not all(isinstance(n, str) and Path(n).name == n for n in parts.values()):
                raise UserError(f"{index}: weight_map is not {{weight: file in this folder}}")
            names = set(parts.values())
        else:
            continue
        break
    else:
        raise UserError(f"{folder}: has no weights: none of {', '.join(_WEIGHTS)}, nor their .index.json")
    check_inputs(*(folder / name for name in sorted(names)))
    weights = {}
    for name in sorted(names):
        for key, value in _read_file(folder / name).items():
            plain = ".".join(part for part in str(key).split(".") if part not in _WRAPPERS)
            if plain in weights:
                raise UserError(f"{folder / name}: has the weight {brief(plain)} a second time, as {brief(key)}")
            weights[plain] = value
    return weights


def _read_file(path: Path) -> dict:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Files from before torch 1.6 are no zip archives, and torch maps nothing else.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        inside = ("model_state_dict", "state_dict", "model", "module")  # a checkpoint with more than the weights
        return dict(next((content[key] for key in inside if isinstance(content.get(key), dict)), content))
    except MemoryError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds for a file they cannot or will not read
        raise UserError(f"{path}: its weights cannot be read; nothing in it was run: {reason(error)}") from None


def _fit(folder: Path, network, weights: dict) -> dict[str, torch.nn.Parameter]:
    """Return the state of ``network`` in float32 out of a folder's tensors. Mutates ``weights``.

    Nothing is invented and nothing is left out. Tensors that `torch.nn.utils.prune` keeps as ``…_orig`` and ``…_mask``
    are multiplied. Embeddings are tied as in transformers 5: one that is missing is another's, one that is there with
    other values stays on its own.

    Raises:
        UserError: weights are missing, too many or of another shape.
    """
    weights.pop(_SURPLUS, None)
    odd = [name for name, t in weights.items() if not _is_plain(t)]
    if odd:
        raise UserError(f"{folder}: no weights in float32, float16 or bfloat16: {_listed(odd)}")
    for name in [n.removesuffix("_orig") for n in weights if n.endswith("_orig")]:
        kept, mask = weights[name + "_orig"], weights.get(name + "_mask")
        if mask is not None and mask.shape == kept.shape and name not in weights:
            weights[name] = kept.float() * mask.float()
            del weights[name + "_orig"], weights[name + "_mask"]
    first = next((name for name in TIED if name in weights), None)
    shapes = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    missing = [n for n in shapes if n not in weights and n not in (TIED if first else TIED[1:])]
    surplus = [n for n in weights if n not in shapes]
    other = [f"{n} is {tuple(weights[n].shape)} and should be {shapes[n]}" for n in shapes
             if n in weights and weights[n].shape != shapes[n]]
    refuse(f"{folder}: the weights do not fit config.json", [
        f"{len(names)} {what}: {_listed(names)}" for what, names in (
            ("missing", missing), ("of another shape", other), ("surplus", surplus)) if names])
    state = {name: torch.nn.Parameter(t.detach().float().contiguous()) for name, t in weights.items()}
    for name in TIED:
        if name not in state or torch.equal(state[name], state[first]):
            state[name] = state[first]
    return state


def _listed(names: list[str]) -> str:
    return ", ".join(str(name)[:200] for name in names[:3]) + (", …" if len(names) > 3 else "")


def _is_plain(t) -> bool:
    """Tell whether a value out of a foreign file is a dense tensor of floats that has all its numbers in memory."""
    return isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu" and t.dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64) and (
            t.untyped_storage().nbytes() >= t.numel() * t.element_size())


def make_tiny(corpus: Corpus) -> Model:
    """Return a small, freshly initialised T5 with a tokenizer trained on the training text of ``corpus``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=TINY_VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"],
                                  min_frequency=4, show_progress=False)
    pairs = read_pairs(corpus, "train")
    tokenizer.train_from_iterator((sentence for pair in pairs for sentence in pair), trainer)
    eos = TINY["eos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    network = build_network(TINY | {"vocab_size": tokenizer.get_vocab_size()})
    print(f"tiny: {tokenizer.get_vocab_size():,} tokens learned from {len(pairs):,} pairs", file=sys.stderr)
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
    return Model(initialize(network), text, source=corpus.source, target=corpus.target)
