"""Sealed torch archives: a dictionary of tensors and plain values, read without running code, every bit checked.

A zip comment after the last byte holds the SHA-256 of the file, so that any flipped bit is noticed.
"""

import hashlib
import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path

import torch

from common.errors import UserError, brief, reason
from common.files.atomic import atomic_write, file_problem

# All that the pickle inside a sealed file may name: how `torch.save` writes a tensor.
_PICKLED = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Bool", "Int", "Long")}
_SEAL = b"sha256="
_SEAL_BYTES = len(_SEAL) + 64


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
        raise UserError(f"{path}: is not {what} of this toolkit; nothing in it was run "
                        f"({reason(error, 120)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not {what} of this toolkit")
    return content


def is_text(value) -> bool:
    """Tell whether a value out of a foreign pickle is a string that UTF-8 can hold (half a surrogate pair is not)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def all_plain(tensors, dtype) -> bool:
    """Tell whether a value out of a foreign pickle is {text: plain dense tensor of ``dtype`` without attributes}."""
    return isinstance(tensors, dict) and all(
        is_text(name) and type(t) is torch.Tensor and not vars(t) and t.dtype == dtype and t.device.type == "cpu"
        and t.is_contiguous() and not t.is_neg() for name, t in tensors.items())
