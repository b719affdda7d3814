"""Reading and writing files so that nothing is lost: atomic replacement, bounded JSON, digests, locks."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import reprlib
from pathlib import Path

MAX_JSON_BYTES = 64 << 20  # a scheme for hundreds of configurations of T5-11B has well under 10 MB
MAX_JSON_DEPTH = 100


class UserError(Exception):
    """Something the user can mend; its text is the whole message. `common.cli.run` turns it into exit code 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived and the work stopped in good order; exit code 128 + signum.

    As KeyboardInterrupt no `Exception`: raised by a signal handler anywhere, no ``except Exception`` may eat it.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


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


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends well.

    The data is flushed to disk before the rename, so that after a crash at any moment ``path`` is either the
    old file or the new one. If the block raises, the temporary file is removed and ``path`` is untouched.
    """
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


def to_json(value) -> str:
    """Return JSON with sorted keys, one stable text for one value; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value) -> None:
    """Write ``value`` as indented JSON atomically; key order is the caller's."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(f"{path}: not written, for JSON has no word for a number that is not finite") from None
    write_bytes(path, (text + "\n").encode())


def parse_json(data: bytes, name: str):
    """Parse UTF-8 JSON of bounded size and depth from an untrusted source.

    Raises:
        UserError: ``name`` is too large, nested too deeply, not JSON, or has a key twice in one object.
    """
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{name}: JSON of more than {MAX_JSON_BYTES >> 20} MiB is not read")

    def unique(pairs):
        result = dict(pairs)
        if len(result) < len(pairs):
            seen = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise UserError(f"{name}: the key {brief(twice)} stands twice in one object")
        return result

    def constant(text):
        raise ValueError(f"{text} is not a JSON number")

    try:
        text = data.decode("utf-8-sig")
        depth = 0
        # Strings are skipped whole, so that brackets inside them do not count; one that never ends is skipped
        # to the end of the text, for looking for its end again from every quote inside takes quadratic time.
        for token in re.finditer(r'"(?:[^"\\]++|\\.)*+"?|[\[{\]}]', text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if depth > MAX_JSON_DEPTH:
                raise UserError(f"{name}: JSON nested more than {MAX_JSON_DEPTH} deep is not read")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character can be neither printed nor written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not valid JSON: {error}") from None


def read_json(path: Path):
    """Read a JSON file; see `parse_json`."""
    problem = file_problem(path)
    if problem:
        raise UserError(problem)
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), str(path))


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80


def brief(value) -> str:
    """Return ``repr(value)`` cut to about a line; the work is bounded, whatever an untrusted file made of it."""
    return " ".join(_brief.repr(value).split())[:200]


def digest(data: bytes | str) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def is_provenance(value) -> bool:
    """Tell whether a value out of a foreign file has the shape that `common.provenance.provenance` gives it."""
    if not isinstance(value, dict) or not all(isinstance(value.get(k, {}), dict) for k in (
            "arguments", "versions", "inputs")) or not isinstance(value.get("stage", ""), str):
        return False
    return all(isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("sha256"), str)
               and is_provenance(entry.get("provenance")) for entry in value.get("inputs", {}).values())


@contextlib.contextmanager
def locked(*paths: Path | None):
    """Hold ``paths`` (outputs, a checkpoint folder) for this process alone; None is left out.

    Raises:
        UserError: another process that still runs holds one. A killed process leaves no lock behind.
    """
    with contextlib.ExitStack() as stack:
        for path in filter(None, paths):
            stack.enter_context(_locked(path))
        yield


@contextlib.contextmanager
def _locked(path: Path):
    path = path if path.name else path.absolute()  # "." has no name
    name = path.with_name(f".{path.name}.lock")
    while True:
        handle = os.open(name, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise UserError(f"{path}: another run is writing it; wait for that one or choose another "
                            "output") from None
        # Whoever finished between our open and our lock has unlinked this file: take the one that is there now.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(name)):
                break
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
        os.close(handle)
