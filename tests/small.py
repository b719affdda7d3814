"""Small models and a small text for the tests."""

import importlib.util
from pathlib import Path

import torch

from common.text import corpus

ROOT = Path(__file__).parent.parent
SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
         "decoder_start_token_id": 0, "dropout_rate": 0.1}


def load_stage(name: str):
    """Import a stage script; hyphenated names are no module names."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo_pairs(split: str) -> list[tuple[str, str]]:
    """Return a split of the demo text."""
    return corpus.read_pairs(corpus.Corpus(corpus.DEMO, "en", "de"), split)


def write_corpus(folder: Path, sizes=(200, 40, 30)) -> None:
    """Write the start of the demo text as a Multi30K folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in zip(("train", "val", "test_2016_flickr"), sizes, strict=True):
        for i, language in enumerate(("en", "de")):
            lines = [pair[i] + "\n" for pair in demo_pairs(split)[:size]]
            (folder / f"{split}.{language}").write_text("".join(lines), encoding="utf-8")


def make_tokenizer(vocabulary: int = 300):
    """Train a small unigram tokenizer on the demo text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>"],
                                      unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator((s for pair in demo_pairs("train")[:300] for s in pair), trainer)
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


def small_network(kind: str = "t5", seed: int = 0, **changes):
    """Return a small random T5 or mT5 in evaluation mode, its layer norms not all ones; no tokenizer belongs to it."""
    from common.t5.network import build_network, initialize

    ids = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1}
    shapes = build_network({"model_type": kind} | SMALL | ids | changes)
    torch.manual_seed(seed)
    network = initialize(shapes)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "layer_norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return network


def theirs(network):
    """Return transformers' T5 or mT5 with the weights of one of ours."""
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

    config = {key: value for key, value in network.config.to_dict().items() if key != "model_type"}
    made = T5ForConditionalGeneration(T5Config(**config)) if network.config.model_type == "t5" else \
        MT5ForConditionalGeneration(MT5Config(**config))
    made.load_state_dict(network.state_dict(keep_vars=True), assign=True)
    return made.eval()


@torch.no_grad()
def logits_of(network, ids, decoder_ids, mask=None) -> torch.Tensor:
    """Return the logits of our network or of transformers'."""
    made = network(input_ids=ids, decoder_input_ids=decoder_ids, attention_mask=mask)
    return getattr(made, "logits", made)


@torch.no_grad()
def states_of(network, batch: dict) -> torch.Tensor:
    """Return the decoder's states (batch, target length, d_model) at the end of the stack."""
    from common.t5.loss import shift_right

    return network.decoder(shift_right(batch["labels"], network.config), None,
                           *network.encode(batch["input_ids"], batch["attention_mask"]))


class Text:
    """Random sentence pairs of token ids in padded batches; what `Batches` is for whatever needs no tokenizer."""

    def __init__(self, seed: int = 0, pairs: int = 40, longest: int = 12, batch: int = 8):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, longest + 1, (pairs, 2), generator=g).tolist()
        self.pairs = [tuple(torch.randint(3, 50, (n,), generator=g) for n in pair) for pair in lengths]
        self._batch = batch

    def __len__(self) -> int:
        return len(self.pairs)

    def fixed(self, device="cpu"):
        """Yield every batch once, as `common.text.batches.Batches.fixed`."""
        from torch.nn.utils.rnn import pad_sequence

        for i in range(0, len(self.pairs), self._batch):
            sources, targets = zip(*self.pairs[i:i + self._batch], strict=True)
            ids = pad_sequence(sources, batch_first=True, padding_value=0)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in sources])[:, None]
            yield {"input_ids": ids, "attention_mask": mask.long(),
                   "labels": pad_sequence(targets, batch_first=True, padding_value=-100)}


@torch.no_grad()
def seen_by_hooks(network, text: Text, names) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return what modules received and gave, all tokens' rows: the network itself, one sentence at a time, unpadded."""
    from common.t5.loss import shift_right

    rows = {name: ([], []) for name in names}

    def hook(name):
        def note(module, args, output):
            rows[name][0].append(args[0][0])
            rows[name][1].append(output[0])
        return network.get_submodule(name).register_forward_hook(note)

    hooks = [hook(name) for name in rows]
    for source, target in text.pairs:
        network(source[None], shift_right(target[None], network.config))
    for handle in hooks:
        handle.remove()
    return {name: (torch.cat(inputs), torch.cat(outputs)) for name, (inputs, outputs) in rows.items()}


def scheme_of(network, *rates: tuple[float, float]):
    """Return the scheme of uniform configurations, each given as (attention rate, linear rate)."""
    from common.pruning.configurations import uniform
    from common.pruning.scheme import make_scheme
    from common.t5.modules import prunable

    return make_scheme([uniform(prunable(network), *pair) for pair in rates])


def write_bank(path: Path, variants, tuned: str | None = None, origin: str = "0" * 64):
    """Write variants as a bank and open it."""
    from common.pruning import bank

    with bank.create(path, origin, "a scheme", tuned, {}) as writer:
        for variant in variants:
            writer.add(variant)
    return bank.load(path)


STAGES = ("download_model", "config_generator", "prune_scheme_generator", "prune", "block-level_finetuning",
          "compose_model", "model-level_finetuning", "baseline_finetuning", "evaluate", "plot_loss")
DATA = ["--data", "text"]
# Every stage with its inputs out of the fixture `made`, for a run inside that folder: {role: good file}.
INPUTS = {
    "config_generator": (["-m", "{model}"], {"model": "origin.pth"}),
    "prune_scheme_generator": (["-i", "{conf}"], {"conf": "conf.json"}),
    "prune": (["-m", "{model}", "-c", "{scheme}"], {"model": "origin.pth", "scheme": "scheme.json"}),
    "block-level_finetuning": (["-m", "{model}", "-p", "{bank}", *DATA], {"model": "origin.pth", "bank": "pruned.npy"}),
    "compose_model": (["-m", "{model}", "-p", "{bank}", "-c", "{conf}", *DATA],
                      {"model": "origin.pth", "bank": "tuned.npy", "conf": "conf.json"}),
    "model-level_finetuning": (["-m", "{model}", "-p", "{bank}", "-c", "{conf}", "--epochs", "1", *DATA],
                               {"model": "origin.pth", "bank": "tuned.npy", "conf": "conf.json"}),
    "baseline_finetuning": (["-m", "{model}", "--epochs", "1", *DATA], {"model": "pruned.pth"}),
    "evaluate": (["-m", "{model}", *DATA], {"model": "pruned.pth"}),
    "plot_loss": (["{stats}"], {"stats": "block.csv"})}
OUTPUTS = {"download_model": "out.pth", "config_generator": "out.json", "prune_scheme_generator": "out.json",
           "prune": "out.npy", "block-level_finetuning": "out.npy", "compose_model": "out.pth",
           "model-level_finetuning": "out.pth", "baseline_finetuning": "out.pth", "evaluate": "out.json",
           "plot_loss": "out.png"}


def arguments(name: str, *more: str, output: str | None = None, **roles: str) -> list[str]:
    """Return a stage's name and arguments for a run inside `made`; ``roles`` are inputs other than its own."""
    given, own = INPUTS.get(name, (["-m", "hub"], {}))
    flag = "--json" if name == "evaluate" else "-o"
    return [name, *[a.format(**own | roles) for a in given], flag, output or OUTPUTS[name], *more]


def refused(result, *parts: str) -> None:
    """Check that a stage ended with exit code 2 and one message that holds all ``parts``."""
    assert result.code == 2, (result.code, result.out, result.err)
    assert "Traceback" not in result.err and "error: " in result.err
    for part in parts:
        assert part in result.err
