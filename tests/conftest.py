"""A small T5, a small corpus and every artifact made from them, once a session; stages run in-process."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import cli, demo_corpus

ROOT = Path(__file__).parent.parent
# A shell that runs the tests in the background has them ignore Ctrl-C; the stages' handling of it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests on real input need a folder with Multi30K and one with a small T5 trained on it; without they are skipped.
REAL_DATA = Path(os.environ.get("MULTI30K_DIR", ROOT / "data" / "multi30k"))
REAL_TEACHER = Path(os.environ.get("TEACHER_DIR", ROOT / "data" / "teacher"))

SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
         "decoder_start_token_id": 0, "dropout_rate": 0.1}


def load_stage(name: str):
    """Import a stage script; hyphenated names are no module names."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stage(capsys, monkeypatch):
    """Run a stage in-process: ``stage("prune", "-m", path)`` returns its exit code, stdout and stderr."""
    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        try:
            code = cli.run(load_stage(name).main)
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)
    return run


def write_corpus(folder: Path, sizes=(200, 40, 30)) -> None:
    """Write the start of the demo corpus as a Multi30K folder."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = demo_corpus.build()
    for split, name, size in zip(("train", "val", "test"), ("train", "val", "test_2016_flickr"), sizes, strict=True):
        for i, language in enumerate(("en", "de")):
            lines = [pair[i] + "\n" for pair in splits[split][:size]]
            (folder / f"{name}.{language}").write_text("".join(lines), encoding="utf-8")


def make_tokenizer(vocabulary: int = 300):
    """Train a small unigram tokenizer on the demo corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>"],
                                      unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator((s for pair in demo_corpus.build()["train"][:300] for s in pair), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def save_folder(folder: Path, kind: str = "t5", seed: int = 0, untie: bool = False, **changes):
    """Write a small random Hugging Face T5 or mT5 folder with ``tokenizer.json``; return the network."""
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config, network = (T5Config, T5ForConditionalGeneration) if kind == "t5" else (
        MT5Config, MT5ForConditionalGeneration)
    model = network(config(**(SMALL | {"vocab_size": tokenizer.get_vocab_size()} | changes))).eval()
    if untie:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with everything the stages make, built by the stages themselves; read-only for the tests."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "text")
    save_folder(folder / "hub")
    data = ["--data-dir", str(folder / "text")]

    def run(name, *arguments):
        assert load_stage(name).main([str(a) for a in arguments]) == 0, name

    run("download_model", "-m", folder / "hub", "-o", folder / "origin.pth")
    run("config_generator", "-m", folder / "origin.pth", "-o", folder / "conf.json",
        "--attention", 0.25, 0.5, "--linear", 0.5, 0.8)
    run("prune_scheme_generator", "-i", folder / "conf.json", "-o", folder / "scheme.json")
    run("prune", "-m", folder / "origin.pth", "-c", folder / "scheme.json", "-o", folder / "pruned.npy",
        "-p", folder / "pruned.pth")
    run("block-level_finetuning", "-m", folder / "origin.pth", "-p", folder / "pruned.npy", "-o",
        folder / "tuned.npy", "--stats", folder / "block.csv", *data)
    return folder


@pytest.fixture
def work(made, tmp_path):
    """A private copy of `made`."""
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def origin(made):
    """The small original model, loaded anew (session-wide, do not change it)."""
    from common import models

    return models.load(made / "origin.pth")


@pytest.fixture(scope="session")
def text(made, origin):
    """The small corpus, tokenised: (training, validation) batches."""
    from common.data import Batches, DataOptions, read_pairs

    options = DataOptions("multi30k", made / "text", "en", "de", "test_2016_flickr")
    return tuple(Batches(read_pairs(options, split), origin, 400) for split in ("train", "val"))
