"""A header says what the whole model file says, and reads no foreign object."""

import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from common.errors import UserError
from common.pruning.variants import heads_present, units_present
from common.t5 import model as models
from common.t5.header import read_header
from common.t5.modules import prunable
from tests.mutants import address_space
from tests.small import ROOT


@pytest.mark.parametrize("name", ["origin.pth", "pruned.pth"])
def test_it_says_what_the_model_says(made, name):
    model, header = models.load(made / name), read_header(made / name)
    assert header.config == model.network.config
    assert list(header.kinds.items()) == list(prunable(model.network).items())
    assert header.present == {
        module: int((heads_present if kind == "attention" else units_present)(model, module).sum())
        for module, kind in header.kinds.items() if kind != "linear"}


def test_it_needs_no_torch(made):
    code = ("import sys; from pathlib import Path; from common.t5.header import read_header; "
            "read_header(Path(sys.argv[1])); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, made / "origin.pth"], check=True, cwd=ROOT)


def test_a_file_that_is_none_or_cut_off_is_refused(made, tmp_path):
    path = tmp_path / "m.pth"
    whole = (made / "origin.pth").read_bytes()
    for content in (b"", b"text", whole[:1000], whole[:-200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="m.pth: "):
            read_header(path)
    with pytest.raises(UserError, match="no.pth"):
        read_header(tmp_path / "no.pth")


def test_any_bit_flipped_where_it_reads_is_noticed(made, tmp_path):
    """Of a model without masks that is the archive's data.pkl; weights are not read."""
    path, whole = tmp_path / "m.pth", (made / "origin.pth").read_bytes()
    with zipfile.ZipFile(made / "origin.pth") as archive:
        entry = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
        start = whole.index(archive.read(entry))
    for at in range(0, entry.file_size, max(entry.file_size // 60, 1)):
        path.write_bytes(whole[:start + at] + bytes([whole[start + at] ^ 1]) + whole[start + at + 1:])
        with pytest.raises(UserError, match="m.pth: "):
            read_header(path)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [Evil(), [1], {"format": "another"},
                                     {"format": "composable-pruning model", "version": 3}])
def test_foreign_content_is_refused_and_not_run(tmp_path, capsys, content):
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content))
    with pytest.raises(UserError, match="is not a model file of this toolkit"):
        read_header(path)
    assert not capsys.readouterr().out


def test_a_compressed_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1000000)
    with pytest.raises(UserError, match="it is compressed"):
        read_header(tmp_path / "m.pth")


def test_ten_bytes_do_not_fill_the_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:  # {}, noted as object 2,000,000,000
        archive.writestr("archive/data.pkl", b"\x80\x02}r" + struct.pack("<I", 2 * 10**9) + b".")
    with address_space(1 << 30), pytest.raises(UserError, match="toolkit; download_model.py makes one"):
        read_header(tmp_path / "m.pth")


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda content: {"version": 4}, "model file version 4, this toolkit reads 3 and older"),
    (lambda content: {"version": None}, "model file version None"),
    (lambda content: {"masks": {names: bits[:-1].clone() for names, bits in content["masks"].items()}},
     "its mask of 'decoder.*does not fit"),
    (lambda content: {"config": content["config"].replace('"d_model": 32', '"d_model": 65536')}, "does not fit"),
], ids=["later", "none", "mask", "configuration"])
def test_content_that_does_not_fit_together_is_refused(made, tmp_path, change, complaint):
    content = torch.load(made / "pruned.pth", weights_only=True)
    torch.save(content | change(content), tmp_path / "m.pth")
    with pytest.raises(UserError, match=f"m.pth: .*{complaint}"):
        read_header(tmp_path / "m.pth")
