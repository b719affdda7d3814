"""Configurations ({module: rate}) and schemes ({block: [rates]}): generate, read, check, write."""

import json
from pathlib import Path

from common.files import UserError, brief, digest, is_provenance, read_json, to_json, write_bytes
from common.modules import block_of, kind_of, members

Configuration = dict[str, float]
Scheme = dict[str, list[tuple[float, ...]]]
FORMAT = "composable-pruning scheme"
VERSION = 2


def uniform(kinds: dict[str, str], attention: float, linear: float) -> Configuration:
    """Return the configuration that prunes every attention at one rate and every linear module at another."""
    return {name: attention if kind == "attention" else linear for name, kind in kinds.items()}


def _rate_problem(value) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"pruning rate {brief(value)} is not a number"
    if not 0 <= value < 1:
        return f"pruning rate {brief(value)} is not in [0, 1)"
    return None


def read_configurations(path: Path) -> list[Configuration]:
    """Read and check a configuration file.

    Raises:
        UserError: lists every problem of the file, each with its configuration and module.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: a configuration file is a list of {{module: rate}}, this is a "
                        f"{type(content).__name__}; config_generator.py writes one")
    if not content:
        raise UserError(f"{path}: holds no configuration")
    problems = []
    for n, configuration in enumerate(content):
        if not isinstance(configuration, dict):
            problems.append(f"configuration {n}: is not {{module: rate}}")
            continue
        for name, value in configuration.items():
            if kind_of(name) is None:
                problems.append(f"configuration {n}: {name!r:.100}: is not a module that can be pruned")
            elif problem := _rate_problem(value):
                problems.append(f"configuration {n}: {name}: {problem}")
    _refuse(path, problems)
    return [{name: float(value) for name, value in c.items()} for c in content]


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError(f"{path}: " + "\n  ".join(shown))


def nth(configurations: list[Configuration], n: int, path: Path) -> Configuration:
    """Return configuration ``n`` (from 0), or raise `UserError` with the valid range."""
    if n >= len(configurations):
        raise UserError(f"{path}: there is no configuration {n}; it holds {len(configurations)}, numbered from 0 "
                        f"to {len(configurations) - 1}")
    return configurations[n]


def check_modules(names, kinds: dict[str, str], path: Path) -> None:
    """Raise `UserError` naming every module in ``names`` that the model (``kinds``) does not have."""
    _refuse(path, [f"{name}: the model has no such module" for name in names if name not in kinds])


def check_head_rates(configuration: Configuration, heads: int, where: str) -> None:
    """Raise `UserError` if a rate would remove every head of an attention."""
    from common.masking import check_removed_heads

    for name, value in configuration.items():
        if kind_of(name) == "attention":
            try:
                check_removed_heads(value, heads)
            except UserError as error:
                raise UserError(f"{where}: {name}: {error}") from None


def required_variants(configuration: Configuration) -> dict[str, tuple[float, ...]]:
    """Return {block: rates of its members}, leaving out the blocks that stay as they are."""
    blocks = dict.fromkeys(block_of(name) for name in configuration)
    rates = {b: tuple(float(configuration.get(m, 0.0)) for m in members(b)) for b in blocks}
    return {block: r for block, r in rates.items() if any(r)}


def make_scheme(configurations: list[Configuration]) -> Scheme:
    """Return every block's variants that the configurations need, each once, in order of appearance."""
    scheme: dict[str, dict] = {}  # of dicts without values, for looking through long lists takes quadratic time
    for configuration in configurations:
        for block, rates in required_variants(configuration).items():
            scheme.setdefault(block, {})[rates] = None
    return {block: list(variants) for block, variants in scheme.items()}


def scheme_digest(scheme: Scheme) -> str:
    """Return the SHA-256 of a scheme's blocks."""
    return digest(to_json({block: [list(r) for r in rates] for block, rates in scheme.items()}))


def write_scheme(path: Path, scheme: Scheme, provenance: dict) -> None:
    """Write a scheme with a digest of all its bytes, by which any later edit is noticed."""
    blocks = {block: [dict(zip(members(block), r, strict=True)) for r in rates]
              for block, rates in scheme.items()}
    write_bytes(path, sealed({"format": FORMAT, "version": VERSION, "blocks": blocks, "provenance": provenance}))


def sealed(content: dict) -> bytes:
    """Return ``content`` as indented JSON whose last entry, "digest", is the SHA-256 of the text before it."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    return f'{text},\n  "digest": "{digest(text)}"\n}}\n'.encode()


def is_sealed(path: Path) -> bool:
    """Tell whether a file is what `sealed` made, to the byte."""
    text, _, end = path.read_bytes().rpartition(b',\n  "digest": "')
    return end == f'{digest(text)}"\n}}\n'.encode()


def read_scheme(path: Path) -> tuple[Scheme, dict]:
    """Read and check a scheme; return it and its provenance.

    Raises:
        UserError: it is no scheme, damaged, or it was edited by hand.
    """
    content = read_json(path)
    again = "make it anew with prune_scheme_generator.py"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is not a pruning scheme; {again}")
    if content.get("version") != VERSION:
        raise UserError(f"{path}: scheme version {brief(content.get('version'))}, this toolkit reads {VERSION}; "
                        f"{again}")
    scheme, problems = {}, []
    blocks = content.get("blocks")
    for block, variants in blocks.items() if isinstance(blocks, dict) else ():
        if kind_of(block) is None or block_of(block) != block:
            problems.append(f"{block!r:.100}: is not a block that can be pruned")
            continue
        if not isinstance(variants, list) or not variants:
            problems.append(f"{block}: lists no variant")
            continue
        for variant in variants:
            if not isinstance(variant, dict) or set(variant) != set(members(block)):
                problems.append(f"{block}: a variant needs the rates of {', '.join(members(block))}")
                continue
            bad = [f"{name}: {p}" for name, value in variant.items() if (p := _rate_problem(value))]
            problems += bad
            if not bad:
                scheme.setdefault(block, []).append(tuple(float(variant[m]) for m in members(block)))
    _refuse(path, problems)
    if not scheme:
        raise UserError(f"{path}: holds nothing to prune")
    if not is_sealed(path) or not is_provenance(content.get("provenance")):
        raise UserError(f"{path}: was edited after it was made, or is damaged; change the configuration instead and "
                        f"{again}")
    return scheme, content["provenance"]
