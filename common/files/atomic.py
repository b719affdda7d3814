"""Writing files so that nothing is lost: atomic replacement, locks, checks of inputs and outputs."""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from common import distributed
from common.errors import UserError


def digest(data: bytes | str) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_problem(path: Path) -> str | None:
    """Say why ``path`` is not a readable, non-empty file, or return None."""
    if not path.exists():
        return f"{path}: no such file"
    if not path.is_file():
        return f"{path}: is not a file"
    if not os.access(path, os.R_OK):
        return f"{path}: no permission to read it"
    if path.stat().st_size == 0:
        return f"{path}: is empty"
    return None


def check_inputs(*paths: Path | None) -> None:
    """Raise `UserError` naming every path that is not a readable, non-empty file; None is left out."""
    problems = [p for p in map(file_problem, filter(None, paths)) if p]
    if problems:
        raise UserError("; ".join(problems))


def check_outputs(overwrite: bool, *paths: Path | None) -> None:
    """Raise `UserError` if a path cannot be written, or exists and must not be replaced. Creates missing folders.

    Of several processes the first one checks; after a restart by torchrun, what exists is of this run.
    """
    if not distributed.first():
        return
    paths = [p for p in paths if p is not None]
    real = [os.path.realpath(p) for p in paths]
    if len(set(real)) < len(real):
        raise UserError("two outputs have the same name: " + ", ".join(map(str, paths)))
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, a file name is needed")
        if path.exists() and not (overwrite or distributed.restarted()):
            raise UserError(f"{path}: exists already; choose another name or add --overwrite")
        folder = path.parent
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK) or shutil.disk_usage(folder).free == 0:
            raise UserError(f"{folder}: nothing can be written there")


@contextlib.contextmanager
def outputs(overwrite: bool, *paths: Path | None):
    """Check ``paths``, hold them for this process alone while the block runs, and check again under the lock.

    Two runs that start together cannot both find that an output is not there yet.

    Raises:
        UserError: as `check_outputs`, or another process holds one.
    """
    check_outputs(overwrite, *paths)
    with locked(*paths):
        check_outputs(overwrite, *paths)
        yield


@contextlib.contextmanager
def locked(*paths: Path | None):
    """Hold ``paths`` (outputs, a checkpoint folder) for this process (of several the first) alone; None is left out.

    The lock is an empty hidden file beside the path. It stays (removing it would let two processes hold one name), and
    means nothing once its process has ended, killed or not.

    Raises:
        UserError: another process holds one.
    """
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        for path in filter(None, paths if distributed.first() else ()):
            named = path if path.name else path.absolute()  # "." has no name
            try:
                stack.enter_context(FileLock(named.with_name(f".{named.name}.lock"), blocking=False))
            except Timeout:
                raise UserError(f"{path}: another run is writing it; wait for that one or choose another "
                                "output") from None
        yield


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends well.

    The data is flushed to disk before the rename, so that after a crash at any moment ``path`` is either the
    old file or the new one. If the block raises, the temporary file is removed and ``path`` is untouched.
    Of several processes only the first one writes; what the others write goes nowhere.
    """
    if not distributed.first():
        with open(os.devnull, "w+b") as file:
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk names no file, and nobody knows the temporary name
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_write(path) as file:
        file.write(data)


@contextlib.contextmanager
def new_folder(path: Path, single: bool = False):
    """Yield an empty folder beside ``path`` that gets this name when the block ends well, and else is removed.

    ``path`` is held for this process alone while the block runs. What exists is never touched.

    Args:
        single: not the folder gets the name, but the file that the block wrote into it under ``path``'s own name.

    Raises:
        UserError: there is something of that name, another process holds it, or nothing can be written there.
    """
    def check():
        if os.path.lexists(path):
            raise UserError(f"{path}: exists already; choose another name, or remove it first")
        check_outputs(False, path)

    check()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with locked(path):
        check()
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors makes files that only their owner can read
            os.rename(temporary / path.name if single else temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
