import contextlib
import io
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch

from common.errors import Interrupted, UserError
from common.files import archive
from common.files.archive import all_plain, is_text, load_sealed, save_sealed
from tests.mutants import Hostile, address_space, reseal, sealed_pickle


class Calls:
    """Unpickling this calls something that torch's own list for ``weights_only`` allows."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def path(tmp_path):
    """A small sealed file."""
    save_sealed(tmp_path / "a.pth", {"x": torch.arange(300.0), "name": "ä", "n": 3})
    return tmp_path / "a.pth"


def test_what_was_saved_is_loaded(path):
    content = load_sealed(path, "a file")
    assert torch.equal(content.pop("x"), torch.arange(300.0)) and content == {"name": "ä", "n": 3}


def test_every_flipped_bit_is_noticed_with_the_files_name(path):
    good, rng = path.read_bytes(), random.Random(0)
    for place in {0, 30, len(good) - 80, len(good) - 1, *(rng.randrange(len(good)) for _ in range(200))}:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1:])
        with pytest.raises(UserError, match="a.pth"):
            load_sealed(path, "a file")


@pytest.mark.parametrize("data", [b"\x89PNG" * 99, b"PK\x03\x04" + b"x" * 200, b"x", pickle.dumps(Hostile("x"))])
def test_a_foreign_file_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.pth: is not a file of this toolkit, or is truncated"):
        load_sealed(path, "a file")


@pytest.mark.parametrize("value", [Calls(bytearray, 1 << 33), Calls(torch.Tensor, 1 << 40),
                                   Calls(torch.device, "cuda")])
def test_a_sealed_pickle_that_calls_anything_but_tensors_is_refused(path, value):
    path.write_bytes(sealed_pickle({"format": value}))
    with pytest.raises(UserError, match=r"nothing in it was run \(it names '"):
        load_sealed(path, "a file")


def test_a_sealed_hostile_pickle_does_not_run(path, tmp_path):
    path.write_bytes(sealed_pickle(Hostile(tmp_path / "hacked")))
    with pytest.raises(UserError, match="nothing in it was run"):
        load_sealed(path, "a file")
    assert not (tmp_path / "hacked").exists()


def test_the_hostile_pickle_of_these_tests_is_hostile(tmp_path, path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "hacked"))).close()
    assert (tmp_path / "hacked").exists()
    path.write_bytes(sealed_pickle({"format": 1}))
    assert load_sealed(path, "a file") == {"format": 1}


@pytest.mark.parametrize("how", ["entry", "storage"])
def test_a_size_beyond_the_file_is_refused_before_memory_is_taken(path, how):
    """Each asks for 4 GiB or more; with 1 GiB of address space left, taking it would be a MemoryError."""
    good = path.read_bytes()
    if how == "entry":  # of the zip directory: the size unpacked
        at = good.rindex(b"PK\x01\x02")
        path.write_bytes(reseal(good[:at + 24] + b"\xfe\xff\xff\xff" + good[at + 28:]))
    else:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
            for entry in old.infolist():
                raw = old.read(entry)
                grown = raw.replace(b"M" + struct.pack("<H", 300), b"J" + struct.pack("<i", 1 << 30))
                new.writestr(entry.filename, grown if entry.filename.endswith(".pkl") else raw)
                assert not entry.filename.endswith(".pkl") or grown != raw
        path.write_bytes(reseal(file.getvalue(), comment=False))
    with address_space(1 << 30), pytest.raises(UserError, match="a.pth"):
        load_sealed(path, "a file")


@pytest.mark.parametrize("error", [Interrupted("stop", 15), KeyboardInterrupt(), OSError(28, "full")])
def test_what_stops_torch_in_the_middle_of_a_write_is_raised_as_it_is(tmp_path, monkeypatch, error):
    """Left alone, torch.save makes a RuntimeError about its zip file of it."""
    class File:
        calls = 0

        def write(self, data):
            File.calls += 1
            if File.calls == 3:
                raise error
            return len(data)

        def flush(self):
            pass

    monkeypatch.setattr(archive, "atomic_write", lambda path: contextlib.nullcontext(File()))
    with pytest.raises(type(error)) as caught:
        save_sealed(tmp_path / "a.pth", {"weights": torch.zeros(1000)})
    assert caught.value is error


def test_a_signal_while_a_file_is_read_is_not_taken_for_a_damaged_file(path, monkeypatch):
    def load(*arguments, **options):
        raise Interrupted("stop", 15)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(Interrupted):
        load_sealed(path, "a file")


def hostile_tensor(kind):
    tensor = torch.zeros(8, 8)
    if kind == "attribute":
        tensor.numel = 5
    return {"float64": tensor.double(), "meta": tensor.to("meta"), "complex": tensor * 1j, "attribute": tensor,
            "expanded": torch.zeros(1).expand(8, 8), "negated view": torch._neg_view(tensor),
            "list": [[0.0] * 8] * 8, "sparse": tensor.to_sparse(), "text": "x", "numpy": np.zeros(2)}[kind]


@pytest.mark.parametrize("kind", ["float64", "meta", "sparse", "expanded", "negated view", "list", "attribute", "text",
                                  "complex", "numpy"])
def test_only_plain_dense_tensors_are_plain(kind):
    assert all_plain({"a": torch.zeros(8, 8)}, torch.float32)
    assert not all_plain({"a": torch.zeros(8, 8), "b": hostile_tensor(kind)}, torch.float32)


def test_half_a_character_is_no_text():
    assert is_text("ä\U0001f600") and not is_text("\ud800") and not is_text(3)
    assert not all_plain({"\ud800": torch.zeros(1)}, torch.float32) and not all_plain([], torch.float32)
