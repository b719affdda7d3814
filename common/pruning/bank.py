"""The ``.npy`` bank: variants of the blocks of one scheme, each readable on its own.

A bank is a one-dimensional uint8 array, so ``np.load(path, mmap_mode="r")`` opens it::

    variant data … | index (JSON) | length of the index, 8 bytes | SHA-256 of all after the data, 32 bytes

A variant stores, for each of its weights, the mask as bits (`numpy.packbits`) and the kept values as
little-endian float32 in row order. The index lists every variant with its place and SHA-256.
"""

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, brief
from common.files.atomic import atomic_write, file_problem
from common.files.jsonfile import parse_json, to_json
from common.files.provenance import is_provenance
from common.pruning.configurations import Configuration, rate_problem, required_variants
from common.t5.modules import is_block, members, weight_names

FORMAT = "composable-pruning bank"
VERSION = 1
_TAIL = 8 + 32
_HEADER_BYTES = 128  # NumPy pads its header to a multiple of 64; ours is always this long

Key = tuple[str, tuple[float, ...]]  # (block, rates of its members)


@dataclass
class Variant:
    """One block at given rates: ``weights`` and ``masks`` by weight name; zero outside the mask."""

    block: str
    rates: tuple[float, ...]
    weights: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]

    @property
    def key(self) -> Key:
        return self.block, self.rates

    @property
    def shown_rates(self) -> str:
        """The rates as text, for tables."""
        return " ".join(f"{rate:g}" for rate in self.rates)


def _rates(rates) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _header(size: int) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + \
        text.ljust(_HEADER_BYTES - 11).encode() + b"\n"


class Writer:
    """Writes a bank variant by variant, so that memory holds one at a time; use `create`."""

    def __init__(self, file, origin: str, scheme: str, tuned: str | None, provenance: dict):
        self.file = file
        self.index = {"format": FORMAT, "version": VERSION, "origin": origin, "scheme": scheme, "tuned": tuned,
                      "provenance": provenance, "variants": []}
        file.write(b"\0" * _HEADER_BYTES)

    def add(self, variant: Variant) -> None:
        """Append a variant."""
        buffer, tensors = io.BytesIO(), {}
        for name, weight in sorted(variant.weights.items()):  # the order in which the index lists them
            mask = variant.masks[name].cpu().numpy()
            buffer.write(np.packbits(mask).tobytes())
            buffer.write(weight.detach().to("cpu", torch.float32).numpy()[mask].astype("<f4").tobytes())
            tensors[name] = {"shape": list(mask.shape), "kept": int(mask.sum())}
        data = buffer.getvalue()
        self.index["variants"].append({
            "block": variant.block, "rates": dict(zip(members(variant.block), variant.rates, strict=True)),
            "tensors": tensors, "offset": self.file.tell() - _HEADER_BYTES, "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest()})
        self.file.write(data)

    def finish(self) -> None:
        text = to_json(self.index).encode()
        tail = text + len(text).to_bytes(8, "little")
        self.file.write(tail + hashlib.sha256(tail).digest())
        size = self.file.tell() - _HEADER_BYTES
        self.file.seek(0)
        self.file.write(_header(size))


class create:  # noqa: N801 - reads as a function: `with bank.create(path, …) as writer:`
    """Context manager: a `Writer` whose file replaces ``path`` when the block ends well.

    Args:
        origin: identity of the original model.
        scheme: digest of the scheme the variants come from.
        tuned: how the variants were tuned, None for merely pruned ones.
    """

    def __init__(self, path: Path, origin: str, scheme: str, tuned: str | None, provenance: dict):
        self._atomic = atomic_write(path)
        self._fields = origin, scheme, tuned, provenance

    def __enter__(self) -> Writer:
        self._writer = Writer(self._atomic.__enter__(), *self._fields)
        return self._writer

    def __exit__(self, *error):
        if error[0] is None:
            try:
                self._writer.finish()
            except BaseException as failed:
                self._atomic.__exit__(type(failed), failed, failed.__traceback__)
                raise
        return self._atomic.__exit__(*error)


@dataclass
class Bank:
    """An opened bank; variants are read when asked for."""

    path: Path
    array: np.ndarray
    origin: str
    scheme: str
    tuned: str | None
    provenance: dict
    entries: dict[Key, dict] = field(repr=False)
    sha256: str = ""

    @property
    def keeps_hidden(self) -> bool:
        """Whether wi was tuned for something else than to be nearest to the original's outputs."""
        return self.tuned in ("joint", "exact, hidden units")  # the latter by an earlier version

    def read(self, key: Key) -> Variant:
        """Return one variant, its checksum verified.

        Raises:
            UserError: the variant is damaged.
        """
        block, rates = key
        entry = self.entries[key]
        data = np.array(self.array[entry["offset"]:entry["offset"] + entry["bytes"]])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise UserError(f"{self.path}: is damaged: the checksum of {block} does not fit")
        at, weights, masks = 0, {}, {}
        for name, tensor in entry["tensors"].items():
            shape, kept = tuple(tensor["shape"]), tensor["kept"]
            bits = -(-int(np.prod(shape)) // 8)
            mask = np.unpackbits(data[at:at + bits], count=int(np.prod(shape))).view(bool).reshape(shape)
            if int(mask.sum()) != kept:
                raise UserError(f"{self.path}: is damaged: the mask of {name} does not fit")
            values = np.zeros(shape, dtype=np.float32)
            stored = data[at + bits:at + bits + 4 * kept].view("<f4")
            values[mask] = stored
            if not np.isfinite(stored).all():
                raise UserError(f"{self.path}: {name} at {_rates(rates)} has weights that are not finite")
            at += bits + 4 * kept
            weights[name], masks[name] = torch.from_numpy(values), torch.from_numpy(mask)
        return Variant(block, rates, weights, masks)

    def check_origin(self, identity: str, model_path: Path) -> None:
        """Raise `UserError` unless the bank was made from the model with this identity."""
        if self.origin != identity:
            raise UserError(f"{self.path}: was made from another model than {model_path} (bank: {self.origin[:12]}…, "
                            f"model: {identity[:12]}…); give that model, or run prune.py again")

    def check_serves(self, configuration: Configuration) -> None:
        """Raise `UserError` naming every variant that a configuration needs and the bank lacks."""
        missing = [f"{block} at {_rates(rates)} (the bank has "
                   f"{'; '.join(_rates(r) for b, r in self.entries if b == block) or 'none':.100})"
                   for block, rates in required_variants(configuration).items()
                   if (block, rates) not in self.entries]
        if missing:
            shown = "\n  ".join(missing[:10] + ([f"… and {len(missing) - 10} more"] if missing[10:] else []))
            raise UserError(f"{self.path}: lacks what the configuration needs; run prune_scheme_generator.py and "
                            f"prune.py for it:\n  {shown}")


def _entry_problem(entry) -> bool:
    """Tell whether an index entry is malformed; sizes are checked before anything is allocated."""
    if not (isinstance(entry, dict) and isinstance(entry.get("tensors"), dict)
            and isinstance(entry.get("rates"), dict) and isinstance(entry.get("block"), str)
            and isinstance(entry.get("sha256"), str)):
        return True
    block = entry["block"]
    if not is_block(block) or set(entry["rates"]) != set(members(block)):
        return True
    if not set(entry["tensors"]) <= set(weight_names(block)) or not entry["tensors"]:
        return True
    whole = [entry.get("offset"), entry.get("bytes")]
    size = 0
    for tensor in entry["tensors"].values():
        if not isinstance(tensor, dict) or not isinstance(tensor.get("shape"), list) or len(tensor["shape"]) != 2:
            return True
        whole += [*tensor["shape"], tensor.get("kept")]
        if not all(type(x) is int and 0 <= x < 1 << 40 for x in whole):
            return True
        rows, columns = tensor["shape"]
        size += -(-rows * columns // 8) + 4 * tensor["kept"]
    return size != entry["bytes"] or any(rate_problem(name, rate) for name, rate in entry["rates"].items())


def load(path: Path) -> Bank:
    """Open a bank and check its index.

    Raises:
        UserError: missing, truncated, damaged, or no bank.
    """
    problem = file_problem(path)
    if problem:
        raise UserError(problem)
    foreign = UserError(f"{path}: is not a module bank of this toolkit, or is truncated; prune.py makes one")
    size = path.stat().st_size - _HEADER_BYTES
    with open(path, "rb") as file:
        if size < _TAIL or file.read(_HEADER_BYTES) != _header(size):
            raise foreign
        file.seek(-_TAIL, os.SEEK_END)
        tail = file.read()
        length = int.from_bytes(tail[:8], "little")
        if length > size - _TAIL:
            raise foreign
        file.seek(-_TAIL - length, os.SEEK_END)
        text = file.read(length)
    if hashlib.sha256(text + tail[:8]).digest() != tail[8:]:
        raise UserError(f"{path}: is damaged: the checksum of its index does not fit")
    index = parse_json(text, f"{path}: index")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise foreign
    if index.get("version") != VERSION:
        raise UserError(f"{path}: bank version {brief(index.get('version'))}, this toolkit reads {VERSION}")
    array = np.load(path, mmap_mode="r")
    variants, provenance = index.get("variants"), index.get("provenance")
    entries, end = {}, 0
    for entry in variants if isinstance(variants, list) else ():
        if _entry_problem(entry) or entry["offset"] != end:
            raise foreign
        end += entry["bytes"]
        entries[entry["block"], tuple(float(entry["rates"][m]) for m in members(entry["block"]))] = entry
    if not entries or end != size - _TAIL - length or not all(
            isinstance(index.get(k), str) for k in ("origin", "scheme")) or not is_provenance(provenance):
        raise foreign
    return Bank(path, array, index["origin"], index["scheme"], index.get("tuned"), provenance, entries, tail[8:].hex())
