"""The scheme, {block: [rates]}: what has to be pruned and tuned, each thing once, for all configurations."""

from pathlib import Path

from common.errors import UserError, brief, refuse
from common.files.atomic import digest, write_bytes
from common.files.jsonfile import is_sealed, read_json, sealed, to_json
from common.files.provenance import is_provenance
from common.pruning.configurations import Configuration, rate_problem, required_variants
from common.t5.modules import is_block, members

Scheme = dict[str, list[tuple[float, ...]]]
FORMAT = "composable-pruning scheme"
VERSION = 2


def make_scheme(configurations: list[Configuration]) -> Scheme:
    """Return every block's variants that the configurations need, each once, in order of appearance."""
    scheme: dict[str, dict] = {}  # of dicts without values, for looking through long lists takes quadratic time
    for configuration in configurations:
        for block, rates in required_variants(configuration).items():
            scheme.setdefault(block, {})[rates] = None
    return {block: list(variants) for block, variants in scheme.items()}


def modules_of(scheme: Scheme) -> list[str]:
    """Return the modules that a scheme prunes, each once."""
    return list(dict.fromkeys(m for block, variants in scheme.items() for rates in variants
                              for m, rate in zip(members(block), rates, strict=True) if rate or m == block))


def scheme_digest(scheme: Scheme) -> str:
    """Return the SHA-256 of a scheme's blocks."""
    return digest(to_json({block: [list(r) for r in rates] for block, rates in scheme.items()}))


def write_scheme(path: Path, scheme: Scheme, provenance: dict) -> None:
    """Write a scheme with a digest of all its bytes, by which any later edit is noticed."""
    blocks = {block: [{m: r for m, r in zip(members(block), rates, strict=True) if r or m == block}
                      for rates in variants] for block, variants in scheme.items()}
    write_bytes(path, sealed({"format": FORMAT, "version": VERSION, "blocks": blocks, "provenance": provenance}))


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
        if not is_block(block):
            problems.append(f"{block!r:.100}: is not a block that can be pruned")
            continue
        if not isinstance(variants, list) or not variants:
            problems.append(f"{block}: lists no variant")
            continue
        for variant in variants:
            if not isinstance(variant, dict) or not variant or not set(variant) <= set(members(block)):
                problems.append(f"{block}: a variant needs rates of {', '.join(members(block))}")
                continue
            bad = [f"{name}: {p}" for name, value in variant.items() if (p := rate_problem(name, value))]
            problems += bad
            if not bad:
                scheme.setdefault(block, []).append(tuple(float(variant.get(m, 0.0)) for m in members(block)))
    refuse(path, problems)
    if not scheme:
        raise UserError(f"{path}: holds nothing to prune")
    if not is_sealed(path) or not is_provenance(content.get("provenance")):
        raise UserError(f"{path}: was edited after it was made, or is damaged; change the configuration instead and "
                        f"{again}")
    return scheme, content["provenance"]
