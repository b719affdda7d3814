"""The ``.pth`` model file: one plain dictionary of tensors, strings and numbers that holds a whole model.

Layout (``torch.load(path, weights_only=True, mmap=True)`` reads it)::

    format, version     what this is
    config              the model's Hugging Face configuration, JSON
    tokenizer           the tokenizer (`tokenizers` library), JSON
    prefix              text put before each source sentence
    source, target      languages, parts of the names of text files; en and de where a file has none
    weights             {name: tensor}, tied tensors once; of a pruned weight the kept values, row by row. All float32,
                        or all float16 or bfloat16, which `load` makes float32
    aliases             {name: name in weights} for tied tensors, JSON
    masks               {names of pruned weights, one a line: bits (numpy.packbits) of their masks, one after the other}
    identity            SHA-256 over all of the above, weights in float32, pruned ones with their zeros: the same in
                        whichever type they are stored
    provenance          stage, arguments, seed, versions and the files it was made from, JSON

It is a sealed archive, see `common.files.archive`. Read too are version 2, which had float32 alone and an entry for
each mask, and version 1, which stored pruned weights with zeros.
"""

import copy
import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, brief
from common.files.archive import all_plain, is_text, load_sealed, save_sealed
from common.files.jsonfile import parse_json, to_json
from common.files.provenance import is_provenance
from common.t5.header import FORMAT, VERSION, check_format
from common.t5.modules import prunable, weight_names
from common.t5.network import build_network, sparsity
from common.text.corpus import LANGUAGE

HALF_TYPES = torch.float16, torch.bfloat16


@dataclass
class Model:
    """A translation model and all it needs: network, tokenizer, prefix, languages, masks, origin."""

    network: torch.nn.Module
    tokenizer_json: str
    prefix: str = ""
    source: str = "en"  # language translated from
    target: str = "de"
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    identity: str = ""
    provenance: dict = field(default_factory=dict)

    @property
    def tokenizer(self):
        """The `tokenizers.Tokenizer`; `common.text.batches` appends the end-of-sentence token where it does not.

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


def present(model: Model, name: str) -> torch.Tensor:
    """Return which weights of a parameter are there, bool; a model that was pruned has fewer."""
    weight = model.network.get_parameter(name)
    mask = model.masks.get(name)
    return torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.to(weight.device)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return a bool mask as bits, eight to a byte, row by row."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_mask(bits: torch.Tensor, shape) -> torch.Tensor:
    """Return the bool mask of ``shape`` that `pack_mask` packed."""
    flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(flat.view(bool)).view(*shape)


def _spread(kept: torch.Tensor, mask: torch.Tensor, what: str) -> torch.Tensor:
    """Return a weight with zeros outside its mask, out of the values that `save` kept."""
    if kept.shape != (int(mask.sum()),):
        raise UserError(f"{what} has {kept.numel():,} values, and its mask keeps {int(mask.sum()):,}")
    return torch.zeros(mask.shape).masked_scatter_(mask, kept)


def _identity(content: dict) -> str:
    value = hashlib.sha256()
    for key in ("config", "tokenizer", "prefix", "aliases"):
        value.update(f"{key}:{len(content[key])}:{content[key]}".encode())
    for group in ("weights", "masks"):
        for name, tensor in sorted(content[group].items()):
            value.update(f"{group}:{name}:{tuple(tensor.shape)}".encode())
            value.update(tensor.detach().contiguous().numpy().data)
    return value.hexdigest()


@torch.no_grad()
def rounded(model: Model, dtype: torch.dtype) -> Model:
    """Return a copy of a model whose weights, still float32, are the nearest that ``dtype`` holds.

    Raises:
        UserError: a weight is too large for ``dtype``.
    """
    network = copy.deepcopy(model.network)
    for name, p in network.named_parameters():
        near = p.to(dtype)
        if not torch.isfinite(near).all():
            raise UserError(f"{name} has a weight of {float(p.abs().max()):g}; the largest that {str(dtype)[6:]} holds "
                            f"is {torch.finfo(dtype).max:g}")
        p.copy_(near)
    return replace(model, network=network)


def save(path: Path, model: Model, dtype: torch.dtype = torch.float32) -> None:
    """Write a model file atomically and set ``model.identity``.

    Weights outside a mask are not stored; they must be exactly zero already.

    Args:
        dtype: what weights are stored as; float16 and bfloat16 must hold them exactly, see `rounded`.
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
    kept = {name: weights[name][mask] for name, mask in model.masks.items()}
    for name, w in kept.items():
        assert w.count_nonzero() == weights[name].count_nonzero(), f"{name} has weights outside its mask"
    content = {
        "format": FORMAT, "version": VERSION,
        "config": to_json(network.config.to_dict()), "tokenizer": model.tokenizer_json,
        "prefix": model.prefix, "source": model.source, "target": model.target,
        "weights": weights, "aliases": to_json(aliases),
        "masks": {name: pack_mask(mask) for name, mask in sorted(model.masks.items())},
    }
    model.identity = content["identity"] = _identity(content)
    weights |= kept
    content["weights"] = {name: w.to(dtype) for name, w in weights.items()}
    assert dtype not in HALF_TYPES or all(
        torch.equal(w.float(), weights[name]) for name, w in content["weights"].items()), f"not rounded to {dtype}"
    if content["masks"]:  # 330 bytes of archive a tensor are a hundredth of a small file
        content["masks"] = {"\n".join(content["masks"]): torch.cat(list(content["masks"].values()))}
    content["provenance"] = to_json(model.provenance)
    save_sealed(path, content)


def load(path: Path) -> Model:
    """Read a model file; weights in float32 are mapped from disk copy-on-write, so loading costs no second copy.

    Raises:
        UserError: the file is missing, damaged, foreign, or does not fit together.
    """
    content = load_sealed(path, "a model file")
    check_format(content, path)
    broken = UserError(f"{path}: is not a complete model file of this toolkit")
    content = {"source": "en", "target": "de"} | content
    texts = ("config", "tokenizer", "prefix", "source", "target", "aliases", "identity", "provenance")
    if not all(is_text(content.get(key)) for key in texts) or not re.fullmatch("[0-9a-f]{64}", content["identity"]):
        raise broken
    weights, groups = content.get("weights"), content.get("masks")
    types = (torch.float32, *HALF_TYPES) if content["version"] > 2 else (torch.float32,)
    if not any(all_plain(weights, dtype) for dtype in types) or not all_plain(groups, torch.uint8):
        raise broken
    config, aliases, provenance = (parse_json(content[k].encode(), f"{path}: {k}")
                                   for k in ("config", "aliases", "provenance"))
    if not isinstance(config, dict) or not isinstance(aliases, dict) or not is_provenance(provenance):
        raise broken
    for key in ("source", "target"):
        if not LANGUAGE.fullmatch(content[key]):
            raise UserError(f"{path}: its {key} language is {brief(content[key])}, not a name such as en")
    network = build_network(config, str(path))
    if network.config.decoder_start_token_id is None:
        raise broken
    aliases = {name: of for name, of in aliases.items() if is_text(of) and of in weights}
    shapes = {name: p.shape for name, p in network.state_dict().items()}
    maskable = {weight for name in prunable(network) for weight in weight_names(name)}

    def check(wrong: list[str]) -> None:
        if wrong:
            raise UserError(f"{path}: its weights do not fit its configuration: {', '.join(map(brief, wrong[:3]))}")

    check(sorted(shapes.keys() ^ (weights.keys() | aliases.keys())))
    packed = {}
    for names, bits in groups.items():
        group = names.split("\n")
        sizes = [-(-shapes[name].numel() // 8) if name in maskable & weights.keys() else bits.numel() + 1
                 for name in group]
        if bits.shape != (sum(sizes),):
            raise UserError(f"{path}: its mask of {brief(names)} does not fit")
        packed |= zip(group, bits.split(sizes), strict=True)
    if sum(t.nbytes for t in (*packed.values(), *weights.values())) > path.stat().st_size:
        raise broken  # some share their bytes, to fill our memory
    weights = {name: t.float() for name, t in weights.items()}
    masks = {name: unpack_mask(bits, shapes[name]) for name, bits in packed.items()}
    for name, mask in masks.items():
        if content["version"] > 1:
            weights[name] = _spread(weights[name], mask, f"{path}: {name}")
        elif weights[name].shape == mask.shape and weights[name][~mask].any():
            raise UserError(f"{path}: {name} has weights outside its mask")
    parameters = {name: torch.nn.Parameter(t) for name, t in weights.items()}
    state = parameters | {name: parameters[of] for name, of in aliases.items()}
    check([name for name in shapes if shapes[name] != state[name].shape])
    not_finite = [name for name, t in weights.items() if not torch.isfinite(torch.stack(t.aminmax())).all()]
    if not_finite:
        raise UserError(f"{path}: weights that are not finite: {', '.join(not_finite[:3])}")
    network.load_state_dict(state, assign=True)
    model = Model(network, content["tokenizer"], content["prefix"], content["source"], content["target"], masks,
                  content["identity"], provenance)
    try:
        _ = model.tokenizer
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model


def mask_report(model: Model) -> str:
    """Return 'parameters, share of zeros' of a model in one phrase."""
    total, zeros = sparsity(model.network)
    return f"{total:,} parameters, {zeros / total:.1%} of them zero"
