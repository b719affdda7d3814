"""The tokenizer of a Hugging Face folder, as one JSON text whose tokens equal those of transformers' AutoTokenizer."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import UserError, brief, reason
from common.files.jsonfile import read_json

_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_AS_IT_IS = "PreTrainedTokenizerFast"  # the class with which transformers takes tokenizer.json unchanged
_MAX_EXTRA_IDS = 1 << 12  # transformers makes a token of each
# What transformers' clean_up_tokenization replaces in decoded text, in this order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
_PROBE = "A man 's dog , isn't it ?  Ein Mädchen läuft.\n\t日本 "


def read_tokenizer(folder: Path, config: dict) -> str:
    """Return the tokenizer of a Hugging Face T5 folder as JSON of the `tokenizers` library.

    Special and added tokens may stand in any of four files, and the class that ``tokenizer_config.json`` names may
    build another tokenizer than ``tokenizer.json`` describes. So transformers reads them; it gets copies of these files
    alone, parsed by us, so that no other file and no code of the folder plays a part.

    Args:
        folder: holds ``tokenizer.json`` or ``spiece.model``; a ByT5 needs neither.
        config: the content of ``config.json``.

    Raises:
        UserError: a file is missing or broken, or the tokens would not equal those of transformers.
    """
    parts = {name: read_json(folder / name) for name in _JSON if (folder / name).is_file()}
    for name, content in parts.items():
        if not isinstance(content, dict):
            raise UserError(f"{folder / name}: is no JSON object")
    path = folder / "tokenizer_config.json"
    options = parts.get(path.name, {})
    for key in ("auto_map", "fast_tokenizer_files", "gguf_file"):
        if options.get(key):
            raise UserError(f"{path}: has {key}, which asks for foreign code or other files")
    extra = options.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= _MAX_EXTRA_IDS:
        raise UserError(f"{path}: has extra_ids = {brief(extra)}, allowed is 0 to {_MAX_EXTRA_IDS:,}")
    named = options.get("tokenizer_class") or config.get("tokenizer_class")
    sentencepiece = folder / "spiece.model"
    if named != "ByT5Tokenizer" and "tokenizer.json" not in parts and not sentencepiece.is_file():
        raise UserError(f"{folder}: has neither tokenizer.json nor spiece.model, and neither tokenizer_config.json nor "
                        "config.json says \"tokenizer_class\": \"ByT5Tokenizer\", which needs none")
    try:
        _check_class(named)
        with TemporaryDirectory() as copy:
            kind = {"model_type": config["model_type"], "tokenizer_class": named}
            for name, content in (parts | {"config.json": kind}).items():
                Path(copy, name).write_text(json.dumps(content), encoding="utf-8")
            if sentencepiece.is_file():
                shutil.copyfile(sentencepiece, Path(copy, sentencepiece.name))
            return _equal(copy).to_str()
    except MemoryError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds for files they cannot read
        hint = "" if "tokenizer.json" not in parts or named == _AS_IT_IS else (
            f'; if tokenizer.json is right, let tokenizer_config.json say "tokenizer_class": "{_AS_IT_IS}"')
        raise UserError(f"{folder}: transformers' AutoTokenizer cannot read its tokenizer, or not as one that this "
                        f"toolkit can keep: {reason(error)}{hint}") from None


def _check_class(name) -> None:
    """Raise `ValueError` unless transformers reads a tokenizer class of this name into one that we can keep."""
    from transformers import ByT5Tokenizer, TokenizersBackend
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = tokenizer_class_from_name(name) if isinstance(name, str) else name
    # With None, or a name that it does not know, transformers goes by model_type and tokenizer.json.
    if found is not None and not (isinstance(found, type) and issubclass(found, (TokenizersBackend, ByT5Tokenizer))):
        raise ValueError(f"tokenizer_class = {brief(name)}")


def _equal(folder: str):
    """Return the `tokenizers.Tokenizer` whose tokens equal AutoTokenizer's for ``folder``."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = Tokenizer.from_str(theirs.backend_tokenizer.to_str()) if theirs.is_fast else _bytes(theirs)
    ours.no_padding()
    ours.no_truncation()
    if theirs.clean_up_tokenization_spaces and not (theirs.is_fast and isinstance(ours.model, models.BPE)):
        ours.decoder = decoders.Sequence([ours.decoder, decoders.Fuse(),
                                          *(decoders.Replace(before, after) for before, after in _CLEAN_UP)])
    added = list(theirs.added_tokens_encoder)
    for text in (_PROBE, " ".join(["a", *added, "b"]), "c".join(["a", *added, "b"])):
        ids = theirs(text).input_ids
        if ours.encode(text).ids != ids or ours.decode(ids) != theirs.decode(ids, skip_special_tokens=True):
            raise ValueError(f"the tokens of {text!r:.80} differ")
    return ours


def _bytes(theirs):
    """Return ByT5's tokenizer, which transformers has in Python alone: byte b is token b + 3, after three special ones.

    Raises:
        ValueError: ``theirs`` has other tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = sorted(theirs.added_tokens_decoder.items())
    vocabulary = {str(token): i for i, token in added[:3]}
    vocabulary |= {letter: byte + 3 for byte, letter in bytes_to_unicode().items()}
    ours = Tokenizer(models.BPE(vocabulary, []))
    ours.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Rust marks bytes that are no UTF-8, Python leaves them out.
    ours.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\ufffd", "")])
    eos = theirs.eos_token
    ours.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, theirs.eos_token_id)])
    ours.add_tokens([AddedToken(t.content, lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized,
                                special=t.content in theirs.all_special_tokens) for _, t in added])
    if any(ours.token_to_id(str(token)) != i for i, token in added):
        raise ValueError("a ByT5 whose special tokens are not the first three, or have gaps behind the bytes")
    return ours
