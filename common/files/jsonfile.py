"""JSON of bounded size and depth, read from untrusted files; JSON that carries a digest of itself."""

import json
import re
from pathlib import Path

from common.errors import UserError, brief
from common.files.atomic import digest, file_problem, write_bytes

MAX_JSON_BYTES = 64 << 20  # a scheme for hundreds of configurations of T5-11B has well under 10 MB
MAX_JSON_DEPTH = 100


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


def sealed(content: dict) -> bytes:
    """Return ``content`` as indented JSON whose last entry, "digest", is the SHA-256 of the text before it."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    return f'{text},\n  "digest": "{digest(text)}"\n}}\n'.encode()


def is_sealed(path: Path) -> bool:
    """Tell whether a file is what `sealed` made, to the byte."""
    text, _, end = path.read_bytes().rpartition(b',\n  "digest": "')
    return end == f'{digest(text)}"\n}}\n'.encode()


def read_measurement(path: Path, what: str, version: int, origin: dict[str, str]) -> dict:
    """Read a sealed file {"format": "composable-pruning ``what``", "version", "of": {role: SHA-256}, …}.

    Args:
        origin: what it must have been measured on, {role: SHA-256}.

    Raises:
        UserError: it is none, is damaged, or was measured on something else, with both hashes.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != f"composable-pruning {what}" or \
            content.get("version") != version:
        raise UserError(f"{path}: is not a {what} file of this toolkit; remove it, it is measured anew")
    if not is_sealed(path):
        raise UserError(f"{path}: was edited after it was made, or is damaged; remove it, it is measured anew")
    of = content.get("of") if isinstance(content.get("of"), dict) else {}
    other = [f"{role}: {brief(of.get(role))}, now {sha!r}" for role, sha in origin.items() if of.get(role) != sha]
    if other:
        raise UserError(f"{path}: was measured on something else; remove it and it is measured anew:\n  "
                        + "\n  ".join(other))
    return content
