"""What a stage sets before it touches a tensor: threads, allocator, seed, device; memory and progress."""

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path

from common import distributed
from common.errors import UserError, reason

# OpenMP's threads spin at barriers, two to a core as soon as anything else runs: of two translations at once each took
# 64 s instead of 1.1 s alone, with this 1.8 s. Read by OpenMP when torch is imported, hence set at our import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def setup(device: str, seed: int = 0):
    """Seed PyTorch and return the `torch.device` that ``device`` names. OMP_NUM_THREADS sets the threads.

    Of several processes (`common.distributed`) each gets its own GPU, and they are connected.

    Raises:
        UserError: ``device`` is unknown or not there.
    """
    keep_freed_memory()
    import torch

    torch.manual_seed(seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("not cpu, cuda or cuda:N")
        chosen = distributed.own_gpu(device, chosen)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used: {reason(error, 200)}") from None
    distributed.start(chosen)
    return chosen


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning them to the kernel (Linux; elsewhere nothing happens).

    With the default thresholds every activation above 128 KiB is mapped and unmapped anew, and a training step
    spends 10 to 60 % of its time in page faults. Some versions of glibc refuse an mmap threshold above 32 MiB, and
    the other call alone would freeze it at 128 KiB, so that one is made only where a threshold was accepted.

    Returns:
        Whether glibc took the setting.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc = ctypes.CDLL(None)
    accepted = any(libc.mallopt(m_mmap_threshold, size) for size in (1 << 30, 32 << 20))
    return accepted and bool(libc.mallopt(m_trim_threshold, -1))


def available_memory(device="cpu") -> int | None:
    """Return how many bytes of memory new work may take on a device, None where the system does not tell."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of freed memory is free
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        there = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
        with contextlib.suppress(OSError, ValueError, LookupError):  # a container's; "max" is no limit
            limit, used = (int(Path(f"/sys/fs/cgroup/memory.{what}").read_text()) for what in ("max", "current"))
            parts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            there = min(there, limit - used + int(parts["file"]))  # files that are mapped or cached can be dropped
        return there
    return None


def say(text: str) -> None:
    """Print progress to stderr, above a progress bar; if its reader has left (`… 2>&1 | tee`, Ctrl-C), go on."""
    from tqdm import tqdm

    with contextlib.suppress(OSError, RuntimeError):  # the latter in a signal that met us within a write
        tqdm.write(text, file=sys.stderr)


def progress(steps=None, what: str = "", total: int | None = None, **options):
    """Return a tqdm bar over ``steps`` on stderr; silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(steps, desc=what, total=total, file=sys.stderr, disable=None, leave=False,
                dynamic_ncols=True, **options)
