"""What an artifact says of its making, kept with it and with everything made from it."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

GENERATIONS = 25  # of ancestors that are told; more would make JSON that is nested deeper than we read


def _recent(origin: dict, generations: int) -> dict:
    """Return a provenance whose ancestors end after so many generations, with file and SHA-256."""
    inputs = {role: entry | {"provenance": _recent(entry["provenance"], generations - 1) if generations else {}}
              for role, entry in origin.get("inputs", {}).items()}
    return origin | ({"inputs": inputs} if inputs else {})


def provenance(stage: str, args, inputs: dict[str, tuple[Path, str, dict]]) -> dict:
    """Return an artifact's provenance: stage, arguments, library versions, inputs with their own provenance.

    Args:
        stage: the script's name.
        args: its parsed arguments.
        inputs: {role: (path, SHA-256 of the content, the input's own provenance)}.
    """
    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    names = ("torch", "transformers", "tokenizers", "torchtext", "numpy")
    return {"stage": stage, "arguments": {k: plain(v) for k, v in sorted(vars(args).items())},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
            "inputs": {role: {"file": path.name, "sha256": sha, "provenance": _recent(origin, GENERATIONS)}
                       for role, (path, sha, origin) in inputs.items()}}


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


def tell(*paths: Path) -> int:
    """Print the ancestry of model files, banks, schemes and configurations; return the exit code 0.

    Raises:
        UserError: a file is missing, damaged or of another kind.
    """
    from common import bank, configs, files, models

    for path in paths:
        if path.suffix == ".npy":
            opened = bank.load(path)
            sha, origin = opened.sha256, opened.provenance
        elif path.suffix == ".json" and isinstance(files.read_json(path), list):
            count = len(configs.read_configurations(path))
            print(f"{path} (sha256 {files.digest(path.read_bytes())})\n  {count} configurations, free to be edited")
            continue
        elif path.suffix == ".json":
            scheme, origin = configs.read_scheme(path)
            sha = configs.scheme_digest(scheme)
        else:
            model = models.load(path)
            sha, origin = model.identity, model.provenance
        print(f"{path} (sha256 {sha})\n{ancestry(origin, '  ')}")
    return 0
