import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common import runtime
from common.errors import UserError
from tests.small import ROOT, STAGES


@pytest.mark.parametrize(("own", "expected"), [(None, "passive"), ("active", "active")])
def test_openmp_waits_passively_unless_the_user_has_said_how_and_torch_comes_later(own, expected):
    """OpenMP reads it when torch is imported: every stage must have set it, and nothing have imported torch."""
    code = """import importlib.util, os, sys
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("stage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build_parser()
    assert "torch" not in sys.modules, path
print(os.environ["OMP_WAIT_POLICY"])"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | (
        {"OMP_WAIT_POLICY": own} if own else {})
    done = subprocess.run([sys.executable, "-c", code, *[f"{name}.py" for name in STAGES]], cwd=ROOT, text=True,
                          capture_output=True, env=environment)
    assert done.stdout == expected + "\n", done.stderr


@pytest.mark.parametrize("device", ["warp", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused(device):
    with pytest.raises(UserError, match=f"--device {device}: cannot be used: "):
        runtime.setup(device)


def test_the_seed_decides_what_is_drawn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    draws = []
    for seed in (3, 3, 4):
        assert runtime.setup("auto", seed) == torch.device("cpu")
        draws.append(float(torch.rand(1)))
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_available_memory_is_part_of_the_machines():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.001 * total < runtime.available_memory("cpu") <= total


def test_a_gpus_memory_is_asked_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456) if str(device) == "cuda:1" else None)
    assert runtime.available_memory("cuda:1") == 123


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize(("largest", "calls", "took"), [
    (1 << 30, [(-3, 1 << 30), (-1, -1)], True), (32 << 20, [(-3, 1 << 30), (-3, 32 << 20), (-1, -1)], True),
    (0, [(-3, 1 << 30), (-3, 32 << 20)], False)])
def test_the_allocator_is_set_only_where_glibc_takes_a_threshold(monkeypatch, largest, calls, took):
    """A refused first call and a second one that is accepted would freeze the threshold at 128 KiB."""
    made = []
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(
        mallopt=lambda kind, size: made.append((kind, size)) or int(size <= largest)))
    assert runtime.keep_freed_memory() is took and made == calls


def test_progress_is_silent_where_stderr_is_no_terminal(capsys):
    for _ in runtime.progress(range(3), "work"):
        runtime.say("a line")
    assert capsys.readouterr().err == "a line\n" * 3
