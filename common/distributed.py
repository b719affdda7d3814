"""One stage on several processes or nodes: who does what, and sums over all. In one process nothing happens.

`torchrun` starts the processes, and all that is known of them comes from its environment variables. Every process goes
the same way through the same code: it takes its share of the text, sums are made over all processes, and so all come to
the same decisions. Only the first one (rank 0) writes files and speaks. NCCL sums what lies on GPUs, gloo the rest.

A process that fails leaves its message with torchrun's agent (`tell_once`); the others find out at the start, at their
next sum, or by torchrun's SIGTERM, and end without a message of their own.
"""

import contextlib
import datetime
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from common.errors import UserError, brief

# Connections are there within seconds; the longest wait is for the process that has the most to solve or translate.
PATIENCE = datetime.timedelta(minutes=30)


def launched() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def size() -> int:
    """Return the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def first() -> bool:
    """Tell whether this is the process that writes and speaks."""
    return rank() == 0


@functools.cache
def _store():
    """Return the agent's key-value store; it outlives a restart of the processes."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=PATIENCE))[0]


def _attempt(key: str) -> str:
    return f"pruning/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{key}"


def _me() -> str:
    return f"process {rank()} on {platform.node()}"


def start(device) -> None:
    """Connect the processes once all are there; called by every stage after its cheap checks.

    Raises:
        UserError: another process has failed.
    """
    if not launched():
        return
    store = _store()
    if first():
        store.set("pruning/accepted", "1")  # the outputs were checked: what is there after a restart is this run's
    import torch.distributed as dist

    if size() == 1 or dist.is_initialized():
        return
    store.set(_attempt(f"here/{rank()}"), "1")
    # In Python, because connecting itself waits for minutes and looks at no signal.
    while not store.check([_attempt(f"here/{i}") for i in range(size())]):
        if store.check([_attempt("failed")]):
            raise UserError("another process has failed")
        time.sleep(0.02)
    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank(),
                                world_size=size(), store=dist.PrefixStore(_attempt("group"), store), timeout=PATIENCE)


def finish() -> None:
    """Note that this run's files are written, for processes that are restarted only because another one died."""
    if launched() and first():
        _store().set("pruning/finished", "1")


def finished() -> bool:
    """Tell whether the processes were restarted though everything is written."""
    return launched() and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and _store().check(["pruning/finished"])


def restarted() -> bool:
    """Tell whether torchrun has restarted this run, so that checkpoint and outputs that are there are its own."""
    return launched() and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and _store().check(["pruning/accepted"])


def tell_once(message: str) -> str | None:
    """Return what this process shall say of its end: nothing if another one has said something already."""
    if size() == 1:
        return message
    try:
        deadline = time.monotonic() + 0.5
        while not first() and not _store().check([_attempt("failed")]) and time.monotonic() < deadline:
            time.sleep(0.02)  # most errors meet all processes, and then the first one speaks
        said = _store().compare_set(_attempt("failed"), "", _me()).decode()
    except Exception:  # the agent has gone
        said = _me() if first() else ""
    return None if said != _me() else message if first() else f"{_me()}: {message}"


@contextlib.contextmanager
def silence():
    """Let what processes other than the first print go nowhere while the block runs."""
    if first():
        yield
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


@contextlib.contextmanager
def _together():
    """Turn a failed connection into an error that is printed only if no other process has printed one."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise UserError(f"another process of this run has ended ({brief(str(error).splitlines()[0])})") from None


def add_up(tensor) -> None:
    """Replace a tensor by its sum over all processes, the same bits in each."""
    if size() > 1:
        import torch.distributed as dist

        with _together():
            dist.all_reduce(tensor)


def sums(*numbers: float) -> list[float]:
    """Return each number's sum over all processes."""
    if size() == 1:
        return list(numbers)
    import torch

    together = torch.tensor(numbers, dtype=torch.float64)
    add_up(together)
    return together.tolist()


def highest(number: int) -> int:
    """Return the highest of all processes' numbers."""
    if size() == 1:
        return number
    import torch
    import torch.distributed as dist

    together = torch.tensor(number)
    with _together():
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return int(together)


def gather(value) -> list:
    """Return every process's value, by rank; also the point that none passes before all have come to it."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * size()
    with _together():
        dist.all_gather_object(values, value)
    return values


def gather_at(value, place: int) -> list | None:
    """Return every process's value, by rank, to process ``place``, and None to the others."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * size() if rank() == place else None
    with _together():
        dist.gather_object(value, values, dst=place)
    return values


def share(items: Iterable) -> Iterator:
    """Yield this process's share of ``items``: every n-th one, from its rank on."""
    return islice(items, rank(), None, size())


def interleave(shares: list[list]) -> list:
    """Return in their order the items that `share` divided."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def divide(tasks: list[Callable]) -> list:
    """Return what each task returns, where each is done by the process of its place in the list.

    Every process must give as many tasks, at most one a process; what they return is sent to all.
    """
    return gather(tasks[rank()]() if rank() < len(tasks) else None)[:len(tasks)]


def check_same(values: dict[str, str]) -> None:
    """Raise `UserError` unless all processes were given the same: arguments, and SHA-256 of what they read."""
    everywhere = gather((_me(), values))
    who, expected = everywhere[0]
    for other, found in everywhere[1:]:
        different = [f"{key}: {brief(expected.get(key))} for {who}, {brief(found.get(key))} for {other}"
                     for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
        if different:
            raise UserError("the processes do not read the same; give every node the same files and arguments:\n  "
                            + "\n  ".join(different[:20]))


def wait_for_file(path: Path) -> None:
    """Wait for a file that the first process downloads.

    Raises:
        UserError: it does not come.
    """
    end = time.monotonic() + PATIENCE.total_seconds()
    while not path.is_file():
        if time.monotonic() > end:
            raise UserError(f"{path}: the first process has it, this one does not; nodes must share that folder")
        time.sleep(0.1)


def own_gpu(asked: str, chosen):
    """Return the GPU of this process where a node has several processes, one each.

    Raises:
        UserError: there are fewer GPUs, or the device asked for is one certain GPU.
    """
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    if chosen.type != "cuda" or here == 1:
        return chosen
    if chosen.index is not None or here > torch.cuda.device_count():
        raise UserError(f"--device {asked}: {here} processes on this node need a GPU each, and it has "
                        f"{torch.cuda.device_count()}; start at most so many with --device auto, or use --device cpu")
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(chosen)
    return chosen


def stop() -> None:
    """Close the connections, if there are any."""
    if size() > 1 and (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
        dist.destroy_process_group()
