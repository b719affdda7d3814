"""Where models come from: the Hugging Face hub, a local folder, or a small fresh T5 for offline use."""

import json
import sys
from pathlib import Path

from common.data import DataOptions, read_pairs
from common.files import UserError
from common.models import Model, build_network, read_config

# Two layers each side learn the demo corpus in about two minutes on two cores (README, 'Quick start').
TINY = {"model_type": "t5", "d_model": 128, "d_kv": 16, "d_ff": 512, "num_heads": 8, "num_layers": 2,
        "num_decoder_layers": 2, "dropout_rate": 0.1, "feed_forward_proj": "relu", "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0}
TINY_VOCABULARY = 5000

_NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "spiece.model", "tokenizer_config.json",
           "special_tokens_map.json")


def fetch(name: str) -> Path:
    """Return a local folder with the model: ``name`` itself, or the hub repository's files, downloaded once.

    Raises:
        UserError: no such folder or repository, or no network.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name}: is a file; a Hugging Face model is a folder with config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder")
    from huggingface_hub import HfApi, logging, snapshot_download

    logging.set_verbosity_error()
    print(f"asking the hub for {name}", file=sys.stderr)
    try:
        files = HfApi().list_repo_files(name)
        weights = [f for f in files if f.endswith((".safetensors", ".safetensors.index.json"))]
        weights = weights or [f for f in files if f.startswith("pytorch_model")]
        return Path(snapshot_download(name, allow_patterns=[*_NEEDED, *weights]))
    except Exception as error:  # the hub client raises many kinds: no network, no repository, no permission
        raise UserError(f"{name}: is no folder here and cannot be downloaded from the hub ({type(error).__name__}); "
                        "give a local folder, or -m tiny for a small model that needs no download") from None


def load_folder(folder: Path, source: str, target: str) -> Model:
    """Read a Hugging Face T5 folder (safetensors, or a ``.bin`` read without running code) into a `Model`.

    Weights become float32. The prefix is the one the configuration gives for the language pair
    (``task_specific_params``), as the original T5 has.

    Raises:
        UserError: a file is missing or broken, or it is no T5.
    """
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = read_config(folder)
        kind = type(build_network({k: v for k, v in config.items() if k != "dtype"}, str(folder)))
        network = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = _tokenizer(folder)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder}: is not a readable Hugging Face T5 folder: {reason:.200}") from None
    unfinished = [n for n, p in network.named_parameters() if not torch.isfinite(p).all()]
    if unfinished:
        raise UserError(f"{folder}: weights that are not finite: {', '.join(unfinished[:3])}")
    if getattr(network.config, "decoder_start_token_id", None) is None:
        network.config.decoder_start_token_id = network.config.pad_token_id
    task = (config.get("task_specific_params") or {}).get(f"translation_{source}_to_{target}") or {}
    return Model(network.eval(), tokenizer, str(task.get("prefix") or ""))


def _tokenizer(folder: Path) -> str:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "spiece.model").is_file():
        from transformers import T5Tokenizer

        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    else:
        raise UserError(f"{folder}: has neither tokenizer.json nor spiece.model")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer.to_str()


def make_tiny(options: DataOptions) -> Model:
    """Return a small, freshly initialised T5 with a tokenizer trained on the training text of ``options``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=TINY_VOCABULARY, special_tokens=["<pad>", "</s>", "<unk>"],
                                  min_frequency=4, show_progress=False)
    pairs = read_pairs(options, "train")
    tokenizer.train_from_iterator((sentence for pair in pairs for sentence in pair), trainer)
    network = type(build_network(TINY))
    config = build_network(TINY | {"vocab_size": tokenizer.get_vocab_size()}).config
    print(f"tiny: {tokenizer.get_vocab_size():,} tokens learned from {len(pairs):,} pairs", file=sys.stderr)
    return Model(network(config).eval(), json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
