import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import atomic
from common.files.atomic import atomic_write, check_inputs, check_outputs, locked, outputs, write_bytes
from tests.small import ROOT


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def killed(code: str) -> None:
    """Run ``code``, which kills itself, in a process of its own."""
    code = "import os, pathlib; from common.files import atomic\n" + code + "\n    os.kill(os.getpid(), 9)\n"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9


def test_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    killed(f"with atomic.atomic_write(pathlib.Path({str(path)!r})) as f:\n    f.write(b'new'); f.flush()")
    assert path.read_text() == "old"


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: calls.append(("fsync", os.readlink(f"/proc/self/fd/{f}"))) or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("replace", str(a), str(b))) or replace(a, b))
    write_bytes(tmp_path / "a.json", b"x")
    temporary = calls[0][1]
    assert calls == [("fsync", temporary), ("replace", temporary, str(tmp_path / "a.json")), ("fsync", str(tmp_path))]
    assert os.path.dirname(temporary) == str(tmp_path)


def test_a_locked_output_is_refused_until_it_is_free(tmp_path):
    with locked(tmp_path / "out.pth"):
        with pytest.raises(UserError, match="out.pth: another run is writing it; wait for that one or choose another"):
            with locked(tmp_path / "out.pth"):
                pass
    with locked(tmp_path / "out.pth"):
        pass


def test_the_lock_of_a_killed_process_means_nothing(tmp_path):
    path = tmp_path / "out.pth"
    killed(f"with atomic.locked(pathlib.Path({str(path)!r})):")
    assert (tmp_path / ".out.pth.lock").exists()
    with outputs(False, path):
        pass


def test_outputs_are_checked_again_under_the_lock(tmp_path, monkeypatch):
    """Of two runs that start together the second gets the lock when the first has written its file."""
    @contextlib.contextmanager
    def late(*paths):
        paths[0].write_text("fresh")
        yield

    monkeypatch.setattr(atomic, "locked", late)
    with pytest.raises(UserError, match="a.json: exists already"), outputs(False, tmp_path / "a.json"):
        raise AssertionError("the work began")
    with outputs(True, tmp_path / "a.json"):
        pass


def test_every_bad_input_is_named(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="none: no such file; .*: is not a file; .*empty: is empty"):
        check_inputs(tmp_path / "none", tmp_path, tmp_path / "empty", None)


@pytest.mark.parametrize(("path", "message"), [
    ("old", "old: exists already; choose another name or add --overwrite"), (".", "is a folder, a file name is needed"),
    ("old/below/x", "below: cannot be created: Not a directory"), ("old/x", "old: is not a folder"),
    ("/proc/none/x", "/proc/none: cannot be created")])
def test_an_output_that_cannot_be_written_is_refused(tmp_path, path, message):
    (tmp_path / "old").touch()
    with pytest.raises(UserError, match=message):
        check_outputs(False, tmp_path / path)


def test_missing_folders_are_made(tmp_path):
    check_outputs(False, tmp_path / "new" / "deep" / "x", None)
    assert (tmp_path / "new" / "deep").is_dir()


def test_two_outputs_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="two outputs have the same name"):
        check_outputs(True, tmp_path / "x", tmp_path / "." / "x")


@pytest.fixture
def nobody():
    """For root no folder is read-only: be nobody for a while. Relative paths need no way there from /."""
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 0)
        yield
        os.setresuid(0, 0, 0)
    else:
        yield


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    Path("deep").mkdir()
    Path("deep").chmod(0o555)
    request.getfixturevalue("nobody")
    with pytest.raises(UserError, match="deep: nothing can be written there"):
        check_outputs(False, Path("deep/x"))
