import os
import subprocess
import sys

import pytest

from common import files
from common.files import UserError


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    files.write_bytes(path, b"new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    code = ("import os, pathlib\nfrom common import files\n"
            f"with files.atomic_write(pathlib.Path({str(path)!r})) as f:\n"
            "    f.write(b'new'); f.flush(); os.kill(os.getpid(), 9)\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(__file__))).returncode == -9
    assert path.read_text() == "old"


def test_a_lock_is_exclusive_and_leaves_nothing(tmp_path):
    with files.locked(tmp_path / "out.pth"):
        with pytest.raises(UserError, match="out.pth: another run is writing it"), files.locked(tmp_path / "out.pth"):
            pass
    with files.locked(tmp_path / "out.pth"):
        pass
    assert os.listdir(tmp_path) == []


def test_brackets_inside_strings_are_not_depth():
    assert files.parse_json(b'["' + b"[" * 300 + b'"]', "x") == ["[" * 300]
