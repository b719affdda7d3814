"""A model as a folder that transformers or CTranslate2 loads, and the check that it translates as the model does."""

import json
import logging
from pathlib import Path

import torch

from common.errors import UserError
from common.export import layout
from common.files.provenance import ancestry
from common.t5.model import Model
from common.text.batches import MAX_TOKENS
from common.text.translation import unknown

CHECK_TOKENS = 100  # where a translation of the check is cut
_LOADING = {
    "hf": """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("{name}"), AutoModelForSeq2SeqLM.from_pretrained("{name}")
ids = model.generate(**tokenizer("{prefix}…", return_tensors="pt"))
print(tokenizer.decode(ids[0], skip_special_tokens=True))
""", "ctranslate2": """\
import ctranslate2, tokenizers

translator, tokenizer = ctranslate2.Translator("{name}"), tokenizers.Tokenizer.from_file("{name}/tokenizer.json")
tokens = translator.translate_batch([tokenizer.encode("{prefix}…").tokens], beam_size=1)[0].hypotheses[0]
print(tokenizer.decode([tokenizer.token_to_id(token) for token in tokens]))
"""}


def import_ctranslate2():
    """Return the module `ctranslate2`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ctranslate2
        import ctranslate2.converters.transformers  # noqa: F401 - not loaded with the package
    except ImportError:
        raise UserError("--format ctranslate2: the package ctranslate2 is not installed; run pip install "
                        "'ctranslate2>=4.8,<5'") from None
    ctranslate2.set_log_level(logging.ERROR)  # else it warns of types that this processor has to convert
    return ctranslate2


def write(folder: Path, model: Model, kind: str, quantization: str, name: str) -> tuple[str, int]:
    """Write a model in a format into a folder; return the architecture and its number of weights.

    Args:
        model: its network is on the CPU.
        kind: hf or ctranslate2.
        name: the folder's later name, for its README.

    Raises:
        UserError: CTranslate2 does not know the model's activation.
    """
    _write_tokenizer(folder, model)
    architecture, count = (_write_hf if kind == "hf" else _write_ctranslate2)(folder, model, quantization)
    front = f", with {json.dumps(model.prefix, ensure_ascii=False)} before each sentence" if model.prefix else ""
    how = _LOADING[kind].format(name=name, prefix=json.dumps(model.prefix, ensure_ascii=False)[1:-1])
    (folder / "README.md").write_text(
        f"---\nlanguage: [{model.source}, {model.target}]\npipeline_tag: translation\n---\n"
        f"A {architecture} that translates {model.source} to {model.target}{front}; its weights are {quantization}.\n\n"
        f"```python\n{how}```\n\nHow it was made:\n\n```\n{ancestry(model.provenance)}\n```\n", encoding="utf-8")
    return architecture, count


def _size(network) -> int:
    return sum(p.numel() for p in network.parameters())


def _write_tokenizer(folder: Path, model: Model) -> None:
    from tokenizers import processors

    tokenizer, eos = model.tokenizer, model.network.config.eos_token_id
    if tokenizer.encode("a").ids[-1:] != [eos]:  # then `common.text.batches` appends it
        end = (tokenizer.id_to_token(eos), eos)
        append = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
        before = tokenizer.post_processor
        tokenizer.post_processor = processors.Sequence([before, append]) if before else append
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_hf(folder: Path, model: Model, quantization: str) -> tuple[str, int]:
    from transformers import GenerationConfig
    from transformers.utils import logging as messages

    messages.set_verbosity_error()
    messages.disable_progress_bar()
    network = layout.for_transformers(model.network)
    ids = {key: getattr(model.network.config, key) for key in
           ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    for key, value in (ids | ({"prefix": model.prefix} if model.prefix else {})).items():
        setattr(network.config, key, value)
    network.generation_config = GenerationConfig(**ids, max_new_tokens=MAX_TOKENS)
    network.to(getattr(torch, quantization)).save_pretrained(folder)
    names = {"eos_token": ids["eos_token_id"], "pad_token": ids["pad_token_id"], "unk_token": unknown(model)}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is
        "model_max_length": MAX_TOKENS, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # no T5 takes token types
        **{key: model.tokenizer.id_to_token(i) for key, i in names.items() if i is not None},
    }, ensure_ascii=False, indent=2), encoding="utf-8")
    return type(network).__name__, _size(network)


def _write_ctranslate2(folder: Path, model: Model, quantization: str) -> tuple[str, int]:
    import numpy as np

    converters = import_ctranslate2().converters.transformers
    network, heads = layout.for_ctranslate2(model.network)
    config, tokenizer = network.config, model.tokenizer
    if config.dense_act_fn not in converters._SUPPORTED_ACTIVATIONS:
        raise UserError(f"CTranslate2 does not know the model's activation {config.dense_act_fn}; --format hf does")
    spec = converters.T5Loader().get_model_spec(network)
    for side, count in heads.items():
        getattr(spec, side).num_heads = np.int16(count)
    # The converter goes by tie_word_embeddings, which is always true in transformers 5.
    spec.decoder.scale_outputs = np.float32(config.d_model ** -0.5 if layout.scales_output(config) else 1)
    vocabulary = [tokenizer.id_to_token(i) or f"<no token {i}>" for i in range(config.vocab_size)]
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    no_text = unknown(model)
    spec.config.unk_token = vocabulary[config.pad_token_id if no_text is None else no_text]
    spec.config.bos_token = spec.config.decoder_start_token = vocabulary[config.decoder_start_token_id]
    spec.config.eos_token = vocabulary[config.eos_token_id]
    spec.config.add_attribute("layer_norm_epsilon", config.layer_norm_epsilon)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    return "T5 for CTranslate2", _size(network)


def translations(folder: Path, model: Model, kind: str, sentences: list[str], device) -> list[str]:
    """Return what a written folder makes of sentences by greedy search, through the loading program's own interface."""
    sentences = [model.prefix + sentence for sentence in sentences]
    if kind == "hf":
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True).eval().to(device)
        batch = tokenizer(sentences, return_tensors="pt", padding=True, truncation=True).to(device)
        ids = network.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=CHECK_TOKENS)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        translator = import_ctranslate2().Translator(str(folder), device=torch.device(device).type,
                                                     intra_threads=torch.get_num_threads())
        made = translator.translate_batch([e.tokens[:MAX_TOKENS] for e in tokenizer.encode_batch(sentences)],
                                          beam_size=1, max_decoding_length=CHECK_TOKENS, min_decoding_length=0)
        ids = [[tokenizer.token_to_id(token) for token in result.hypotheses[0]] for result in made]
        texts = tokenizer.decode_batch([[i for i in row if i not in (None, unknown(model))] for row in ids])
    return [text.strip() for text in texts]
