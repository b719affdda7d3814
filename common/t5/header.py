"""What a model file says of itself, read in a tenth of a second: neither torch nor its weights are touched.

So it is not checked whether the weights are whole; whoever uses them reads the file with `common.t5.model.load`.
"""

import io
import pickle
import zipfile
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np

from common.errors import UserError, brief, reason
from common.files.atomic import file_problem
from common.files.jsonfile import parse_json
from common.t5.config import Config
from common.t5.modules import UNIT_PARTS, kind_of

FORMAT, VERSION = "composable-pruning model", 3


@dataclass
class Header:
    """The configuration, the kinds of the prunable modules, and how many heads or hidden units each still has.

    Attributes:
        kinds: {module: kind}, in the network's order.
        present: {attention or feed-forward: number}; a model that was pruned before has fewer than its configuration.
        weights: {name: (how many are not pruned, how many there are with those)}; tied ones once.
        identity: of the model.
    """

    config: Config
    kinds: dict[str, str]
    present: dict[str, int]
    weights: dict[str, tuple[int, int]]
    identity: str


def read_header(path: Path) -> Header:
    """Read the header of a model file.

    Raises:
        UserError: the file is missing, foreign or damaged where it was read.
    """
    problem = file_problem(path)
    if problem:
        raise UserError(problem)
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type or entry.file_size > size for entry in archive.infolist()):
                raise ValueError("it is compressed")
            folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            # All of it, because zipfile compares the checksum at the end alone.
            content = _Unpickler(io.BytesIO(archive.read(f"{folder}data.pkl"))).load()
            check_format(content, path)
            return _header(content, lambda key: archive.read(f"{folder}data/{key}"), path)
    except UserError:
        raise
    except Exception as error:  # zipfile and pickle raise many kinds for a file that is none
        raise UserError(f"{path}: is not a model file of this toolkit, or is truncated "
                        f"({reason(error, 120)})") from None


def check_format(content: dict, path: Path) -> None:
    """Raise `UserError` unless a file's content says that it is a model file of a version that this toolkit reads."""
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: is not a model file of this toolkit; download_model.py makes one")
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:  # a tensor compares elementwise
        raise UserError(f"{path}: model file version {brief(version)}, this toolkit reads {VERSION} and older")


class _Unpickler(pickle._Unpickler):
    """Of plain values, and of tensors the key and the number of their stored values; nothing else is let in.

    The one in Python, because for that in C ten bytes are enough to fill 32 GiB of memory (LONG_BINPUT).
    """

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, *_: storage
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}"[:100])

    def persistent_load(self, saved):
        _, _, key, _, count = saved
        return key, count


def _header(content: dict, read, path: Path) -> Header:
    config = Config.read(parse_json(content["config"].encode(), f"{path}: config"), str(path))
    kinds, present = {}, {}
    for name in content["weights"]:
        module = name.removesuffix(".weight")
        for found in (module.rpartition(".")[0], module):
            if kind_of(found):
                kinds.setdefault(found, kind_of(found))

    def shape(name: str) -> tuple[int, int]:
        part, inner = name.split(".")[-2], config.d_kv * config.num_heads
        here, there = (config.d_ff if part in (*UNIT_PARTS, "wo") else inner), config.d_model
        return (there, here) if part in ("o", "wo") else (here, there)

    masks = {}
    for names, (key, _) in content["masks"].items():
        bits, group = np.frombuffer(read(key), dtype=np.uint8), names.split("\n")
        ends = list(accumulate(-(-prod(shape(name)) // 8) for name in group))
        if len(bits) != ends[-1]:
            raise ValueError(f"its mask of {brief(names)} does not fit")
        for name, part in zip(group, np.split(bits, ends[:-1]), strict=True):
            masks[name] = np.unpackbits(part, count=prod(shape(name))).view(bool).reshape(shape(name))
    for name, kind in kinds.items():
        if kind == "attention":
            mask = masks.get(f"{name}.q.weight")
            present[name] = config.num_heads if mask is None else int(
                mask.reshape(config.num_heads, -1).any(axis=1).sum())
        elif kind == "feed-forward":
            units = np.ones(config.d_ff, dtype=bool)
            for part, across in (*((part, 1) for part in UNIT_PARTS), ("wo", 0)):
                if (mask := masks.get(f"{name}.{part}.weight")) is not None:
                    units &= mask.any(axis=across)
            present[name] = int(units.sum())
    weights = {name: (int(masks[name].sum()), masks[name].size) if name in masks else (count, count)
               for name, (_, count) in content["weights"].items()}
    return Header(config, kinds, present, weights, content["identity"])
