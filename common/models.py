"""The ``.pth`` model file: one plain dictionary of tensors, strings and numbers that holds a whole model.

Layout (``torch.load(path, weights_only=True, mmap=True)`` reads it)::

    format, version     what this is
    config              the model's Hugging Face configuration, JSON
    tokenizer           the tokenizer (`tokenizers` library), JSON
    prefix              text put before each source sentence
    weights             {name: float32 tensor}, tied tensors once
    aliases             {name: name in weights} for tied tensors, JSON
    masks               {weight name: bits (numpy.packbits) of the mask}, for pruned weights
    identity            SHA-256 over all of the above
    provenance          stage, arguments, seed, versions and the files it was made from, JSON

A zip comment after the last byte holds the SHA-256 of the file, so that any flipped bit is noticed.
"""

import hashlib
import os
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common import files, masking
from common.files import UserError, atomic_write, brief, file_problem, is_provenance, parse_json, read_json, to_json
from common.modules import block_of, prunable, weight_names

FORMAT = "composable-pruning model"
VERSION = 1
# What decides the function a T5 computes; paths, versions and defaults of transformers do not belong to it.
CONFIG_KEYS = ("model_type", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "vocab_size",
               "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance",
               "dropout_rate", "layer_norm_epsilon", "scale_decoder_outputs", "pad_token_id", "eos_token_id",
               "decoder_start_token_id")
# Far beyond any T5 there is, and small enough for building one to take no time.
_LIMITS = {"d_model": (1, 1 << 16), "d_kv": (1, 1 << 16), "d_ff": (1, 1 << 20), "num_heads": (1, 1 << 12),
           "num_layers": (1, 256), "num_decoder_layers": (1, 256), "vocab_size": (1, 1 << 24),
           "relative_attention_num_buckets": (4, 1 << 12), "relative_attention_max_distance": (3, 1 << 20),
           "pad_token_id": (0, 1 << 24), "eos_token_id": (0, 1 << 24), "decoder_start_token_id": (0, 1 << 24),
           "dropout_rate": (0.0, 0.99), "layer_norm_epsilon": (0.0, 1.0)}
# All that the pickle inside a sealed file may name: how `torch.save` writes a tensor.
_PICKLED = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Bool", "Int", "Long")}
_SEAL = b"sha256="
_SEAL_BYTES = len(_SEAL) + 64


@dataclass
class Model:
    """A translation model and all it needs: network, tokenizer, prefix, masks, origin."""

    network: torch.nn.Module
    tokenizer_json: str
    prefix: str = ""
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    identity: str = ""
    provenance: dict = field(default_factory=dict)

    @property
    def tokenizer(self):
        """The `tokenizers.Tokenizer`; `common.data` appends the end-of-sentence token where it does not.

        Raises:
            UserError: the text describes no tokenizer.
        """
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self.tokenizer_json)
        except Exception as error:
            raise UserError(f"its tokenizer cannot be read: {str(error):.150}") from None
        tokenizer.no_padding()  # a foreign file may ask for a billion tokens of it
        tokenizer.no_truncation()
        return tokenizer


def _seal_file(file) -> None:
    """Append the SHA-256 of everything before it as the zip archive's comment."""
    file.flush()
    file.seek(0)
    value = hashlib.file_digest(file, "sha256").hexdigest().encode()
    file.seek(-2, os.SEEK_END)  # the comment's length, 0 so far, ends a zip file
    file.write(struct.pack("<H", _SEAL_BYTES) + _SEAL + value)


def _check_seal(path: Path, what: str) -> None:
    size = path.stat().st_size
    foreign = UserError(f"{path}: is not {what} of this toolkit, or is truncated")
    if size < 22 + _SEAL_BYTES:
        raise foreign
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise foreign
        file.seek(size - _SEAL_BYTES - 2)
        tail = file.read()
        if tail[2:2 + len(_SEAL)] != _SEAL:
            raise foreign
        file.seek(0)
        value, left = hashlib.sha256(), size - _SEAL_BYTES - 2
        while left and (block := file.read(min(left, 1 << 20))):
            value.update(block)
            left -= len(block)
        value.update(b"\0\0")
    if value.hexdigest().encode() != tail[2 + len(_SEAL):] or tail[:2] != struct.pack("<H", _SEAL_BYTES):
        raise UserError(f"{path}: is damaged: its checksum does not fit its content")


def save_sealed(path: Path, content: dict) -> None:
    """Write a dictionary of tensors and plain values atomically, with a checksum over the whole file."""
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # so torch reports a full disk, or a signal, that stopped its writing
            while isinstance(error, RuntimeError) and error.__context__:
                error = error.__context__
            raise error from None
        _seal_file(file)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _check_pickle(data: bytes) -> None:
    """Raise `ValueError` if a pickle names anything but plain strided tensors.

    torch's own list for ``weights_only`` is longer: with it 50 bytes that say bytearray(1 << 40) ask for a TiB.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ") or opcode.name.startswith("EXT") or (
                opcode.name == "GLOBAL" and argument not in _PICKLED):
            raise ValueError(f"it names {brief(argument)}")


def load_sealed(path: Path, what: str) -> dict:
    """Read a file that `save_sealed` wrote, without running code from it; tensors stay on disk until used.

    Raises:
        UserError: missing, truncated, damaged, foreign, or holding anything but tensors and plain values.
    """
    problem = file_problem(path)
    if problem:
        raise UserError(problem)
    _check_seal(path, what)
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(i.compress_type or i.file_size > size or i.flag_bits & 1 for i in entries):
                raise UserError(f"{path}: is not {what} of this toolkit")
            for entry in entries:
                if entry.filename.lower().endswith(".pkl"):
                    _check_pickle(archive.read(entry))
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (UserError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds for a file it cannot or will not read
        raise UserError(f"{path}: is not {what} of this toolkit; nothing in it was run ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not {what} of this toolkit")
    return content


def build_network(config: dict, name: str = "model"):
    """Return a T5 or mT5 for conditional generation on the meta device (shapes, no memory).

    Only `CONFIG_KEYS` are read: transformers would obey others of a foreign file, among them one that names code
    to be downloaded (``attn_implementation``).

    Raises:
        UserError: ``config`` describes no T5.
    """
    kind = config.get("model_type")
    if kind == "mt5":
        from transformers.models.mt5.configuration_mt5 import MT5Config as Config
        from transformers.models.mt5.modeling_mt5 import MT5ForConditionalGeneration as Network
    elif kind == "t5":
        from transformers.models.t5.configuration_t5 import T5Config as Config
        from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration as Network
    else:
        raise UserError(f"{name}: is a {brief(kind)} model; this toolkit prunes the T5 family (t5, mt5)")
    config = {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}
    for key, (low, high) in _LIMITS.items():
        value = config.get(key, low)
        kinds = (int, float) if isinstance(high, float) else (int,)
        if type(value) not in kinds or not low <= value <= high:
            raise UserError(f"{name}: its configuration has {key} = {brief(value)}, allowed is {low:,} to {high:,}")
    try:
        parsed = Config(**config)
        for key in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if (getattr(parsed, key, None) or 0) >= parsed.vocab_size:
                raise ValueError(f"{key} is not below vocab_size")
        if parsed.relative_attention_max_distance <= parsed.relative_attention_num_buckets // 2:
            raise ValueError("relative_attention_max_distance is not above half of relative_attention_num_buckets")
        # transformers 5 derives this from tie_word_embeddings, which it then overwrites: keep what was saved.
        if "scale_decoder_outputs" in config:
            parsed.scale_decoder_outputs = config["scale_decoder_outputs"]
        with torch.device("meta"):
            network = Network(parsed)
    except Exception as error:
        raise UserError(f"{name}: its configuration does not describe a T5: {_reason(error)}") from None
    return network.eval()


def place(network, device):
    """Move a network to ``device`` and choose its attention there; return it. Mutates network.

    On the CPU with sentences of some 15 tokens, plain matrix products train 15 to 20 % faster than the fused
    attention (0.28 against 0.34 s a step of 2,048 tokens; 2 cores, 2026-11).
    """
    network.set_attn_implementation("eager" if str(device) == "cpu" else "sdpa")
    return network.to(device)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return a bool mask as bits, eight to a byte, row by row."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_mask(bits: torch.Tensor, shape) -> torch.Tensor:
    """Return the bool mask of ``shape`` that `pack_mask` packed."""
    flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(flat.view(bool)).view(*shape)


def _identity(content: dict) -> str:
    value = hashlib.sha256()
    for key in ("config", "tokenizer", "prefix", "aliases"):
        value.update(f"{key}:{len(content[key])}:{content[key]}".encode())
    for group in ("weights", "masks"):
        for name, tensor in sorted(content[group].items()):
            value.update(f"{group}:{name}:{tuple(tensor.shape)}".encode())
            value.update(tensor.detach().contiguous().numpy().data)
    return value.hexdigest()


def save(path: Path, model: Model) -> None:
    """Write a model file atomically and set ``model.identity``.

    Weights are stored in float32; weights outside a mask must be exactly zero already (`masking.release`).
    """
    network = model.network
    first: dict[int, str] = {}
    weights, aliases = {}, {}
    for name, p in network.state_dict(keep_vars=True).items():
        if id(p) in first:
            aliases[name] = first[id(p)]
        else:
            first[id(p)] = name
            weights[name] = p.detach().to("cpu", torch.float32).contiguous()
    for name, mask in model.masks.items():
        assert not weights[name][~mask].any(), f"{name} has weights outside its mask"
    config = network.config.to_dict()
    keep = {k: config[k] for k in CONFIG_KEYS if config.get(k) is not None}
    content = {
        "format": FORMAT, "version": VERSION, "config": to_json(keep), "tokenizer": model.tokenizer_json,
        "prefix": model.prefix, "weights": weights, "aliases": to_json(aliases),
        "masks": {name: pack_mask(mask) for name, mask in sorted(model.masks.items())},
    }
    model.identity = content["identity"] = _identity(content)
    content["provenance"] = to_json(model.provenance)
    save_sealed(path, content)


def load(path: Path) -> Model:
    """Read a model file; weights are mapped from disk copy-on-write, so loading costs no second copy.

    Raises:
        UserError: the file is missing, damaged, foreign, or does not fit together.
    """
    content = load_sealed(path, "a model file")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: is not a model file of this toolkit; download_model.py makes one")
    if type(content.get("version")) is not int or content["version"] != VERSION:  # a tensor compares elementwise
        raise UserError(f"{path}: model file version {brief(content.get('version'))}, this toolkit reads {VERSION}")
    broken = UserError(f"{path}: is not a complete model file of this toolkit")
    texts = ("config", "tokenizer", "prefix", "aliases", "identity", "provenance")
    if not all(is_text(content.get(key)) for key in texts) or not re.fullmatch("[0-9a-f]{64}", content["identity"]):
        raise broken
    weights, packed = content.get("weights"), content.get("masks")
    if not all_plain(weights, torch.float32) or not all_plain(packed, torch.uint8):
        raise broken
    config, aliases, provenance = (parse_json(content[k].encode(), f"{path}: {k}")
                                   for k in ("config", "aliases", "provenance"))
    if not isinstance(config, dict) or not isinstance(aliases, dict) or not is_provenance(provenance):
        raise broken
    network = build_network(config, str(path))
    if not all(isinstance(getattr(network.config, key, None), int) for key in _LIMITS if key.endswith("_token_id")):
        raise broken
    parameters = {name: torch.nn.Parameter(t) for name, t in weights.items()}
    state = parameters | {name: parameters[of] for name, of in aliases.items() if is_text(of) and of in parameters}
    shapes = {name: p.shape for name, p in network.state_dict().items()}
    wrong = sorted(set(shapes) ^ set(state)) or [n for n in shapes if shapes[n] != state[n].shape]
    if wrong:
        raise UserError(f"{path}: its weights do not fit its configuration: {', '.join(map(brief, wrong[:3]))}")
    not_finite = [name for name, t in weights.items() if not torch.isfinite(t).all()]
    if not_finite:
        raise UserError(f"{path}: weights that are not finite: {', '.join(not_finite[:3])}")
    network.load_state_dict(state, assign=True)
    maskable = {weight for name in prunable(network) for weight in weight_names(block_of(name))}
    masks = {}
    for name, bits in packed.items():
        if name not in maskable or name not in weights or bits.numel() != -(-shapes[name].numel() // 8):
            raise UserError(f"{path}: its mask of {brief(name)} does not fit")
        masks[name] = unpack_mask(bits, shapes[name])
        if weights[name][~masks[name]].any():
            raise UserError(f"{path}: {name} has weights outside its mask")
    model = Model(network, content["tokenizer"], content["prefix"], masks, content["identity"], provenance)
    try:
        _ = model.tokenizer
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model


def is_text(value) -> bool:
    """Tell whether a value out of a foreign pickle is a string that UTF-8 can hold (half a surrogate pair is not)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def all_plain(tensors, dtype) -> bool:
    """Tell whether a value out of a foreign pickle is {text: plain dense tensor of ``dtype`` without attributes}."""
    return isinstance(tensors, dict) and all(
        is_text(name) and type(t) is torch.Tensor and not vars(t) and t.dtype == dtype and t.device.type == "cpu"
        and t.is_contiguous() and not t.is_neg() for name, t in tensors.items())


def mask_report(model: Model) -> str:
    """Return 'parameters, share of zeros' of a model in one phrase."""
    total, zeros = masking.sparsity(model.network)
    return f"{total:,} parameters, {zeros / total:.1%} of them zero"


def read_config(folder: Path) -> dict:
    """Return ``config.json`` of a Hugging Face model folder.

    Raises:
        UserError: it is missing, no T5's, describes a larger model than the folder holds, or wants foreign code.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: is no configuration of a model")
    for key in ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation"):
        if config.get(key):  # transformers would import or even download code for these
            raise UserError(f"{path}: has {key}, which asks for foreign code; only plain T5 models are read")
    labels = config.get("num_labels", 2)
    if type(labels) is not int or not 0 <= labels <= 1 << 10:  # transformers makes a dictionary of so many entries
        raise UserError(f"{path}: has num_labels = {brief(labels)}; a translation model has none")
    tasks = config.get("task_specific_params") or {}
    if not isinstance(tasks, dict) or not all(isinstance(t, dict) for t in tasks.values()):
        raise UserError(f"{path}: task_specific_params is not {{task: {{name: value}}}}")
    for other in folder.glob("*.json"):
        if other.stat().st_size > files.MAX_JSON_BYTES:  # transformers reads them too, however large
            raise UserError(f"{other}: JSON of more than {files.MAX_JSON_BYTES >> 20} MiB is not read")
    # transformers invents the weights that are missing, however many the configuration asks for.
    needed = 2 * sum(p.numel() for p in build_network(config, str(path)).parameters())  # bfloat16 is the smallest
    there = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
    if there < needed:
        raise UserError(f"{folder}: its configuration asks for {needed:,} bytes of weights or more, there are "
                        f"{there:,} (*.safetensors, *.bin)")
    return config
