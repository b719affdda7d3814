"""Device, threads, seed and the allocator: what a stage sets before it touches a tensor."""

import ctypes
import os
import platform
import sys

from common.files import UserError


def setup(device: str, seed: int, threads: int | None = None):
    """Seed PyTorch, set its threads and return the `torch.device` that ``device`` names.

    Raises:
        UserError: ``device`` is unknown or not there.
    """
    keep_freed_memory()
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("not cpu, cuda or cuda:N")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device}: cannot be used: {reason}") from None
    return chosen


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the kernel (Linux; elsewhere nothing happens).

    With the default thresholds every activation above 128 KiB is mapped and unmapped anew, and a training step
    spends 10 to 60 % of its time in page faults.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, -1)
