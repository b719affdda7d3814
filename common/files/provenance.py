"""What an artifact says of its making, kept with it and with everything made from it."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

Input = tuple[Path, str, dict]  # where an input lies, the SHA-256 of its content, its own provenance
GENERATIONS = 25  # of ancestors that are told; more would make JSON that is nested deeper than we read


def _recent(origin: dict, generations: int) -> dict:
    """Return a provenance whose ancestors end after so many generations, with file and SHA-256."""
    inputs = {role: entry | {"provenance": _recent(entry["provenance"], generations - 1) if generations else {}}
              for role, entry in origin.get("inputs", {}).items()}
    return origin | ({"inputs": inputs} if inputs else {})


def provenance(stage: str, arguments: dict, inputs: dict[str, Input]) -> dict:
    """Return an artifact's provenance: stage, arguments, library versions, inputs with their own provenance.

    Args:
        stage: the script's name.
        arguments: its parsed arguments by name.
        inputs: by role.
    """
    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, (str, Path)):  # Python decodes arguments as the terminal's encoding says
            return os.fsencode(value).decode(errors="replace")
        return value

    names = ("torch", "transformers", "tokenizers", "torchtext", "numpy")
    return {"stage": stage, "arguments": {k: plain(v) for k, v in sorted(arguments.items())},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
            "inputs": {role: {"file": plain(path.name), "sha256": sha, "provenance": _recent(origin, GENERATIONS)}
                       for role, (path, sha, origin) in inputs.items()}}


def hashes(inputs: dict[str, Input]) -> dict[str, str]:
    """Return the SHA-256 of each input by role."""
    return {role: sha for role, (_, sha, _) in inputs.items()}


def is_provenance(value) -> bool:
    """Tell whether a value out of a foreign file has the shape that `provenance` gives it."""
    if not isinstance(value, dict) or not all(isinstance(value.get(k, {}), dict) for k in (
            "arguments", "versions", "inputs")) or not isinstance(value.get("stage", ""), str):
        return False
    return all(isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("sha256"), str)
               and is_provenance(entry.get("provenance")) for entry in value.get("inputs", {}).values())


def ancestry(origin: dict, indent: str = "") -> str:
    """Return provenance as an indented tree, one line a stage with its arguments, inputs below it."""
    arguments = " ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in origin.get("arguments", {}).items()
                         if v is not None and v is not False)
    versions = ", ".join(f"{k} {v}" for k, v in origin.get("versions", {}).items())
    lines = [f"{indent}made by {origin.get('stage', 'an unknown stage')}: {arguments}", f"{indent}  with {versions}"]
    for role, entry in origin.get("inputs", {}).items():
        lines.append(f"{indent}  {role}: {entry['file']} (sha256 {entry['sha256']})")
        if entry["provenance"]:
            lines.append(ancestry(entry["provenance"], indent + "    "))
    return "\n".join(lines)
