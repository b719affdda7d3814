"""Configurations, {module: rate}: which fraction of each module of a model is removed."""

import math
from fractions import Fraction
from pathlib import Path

from common.errors import UserError, brief, refuse
from common.files.jsonfile import read_json
from common.t5.modules import kind_of, members, parent_of

Configuration = dict[str, float]


def uniform(kinds: dict[str, str], attention: float, linear: float, feed_forward: float = 0.0) -> Configuration:
    """Return the configuration that prunes every module at its kind's rate; feed-forwards at 0 are left out."""
    rates = {"attention": attention, "linear": linear} | ({"feed-forward": feed_forward} if feed_forward else {})
    return {name: rates[kind] for name, kind in kinds.items() if kind in rates}


def removed_count(rate: float, count: int) -> int:
    """Return rate × count, rounded half up: how many of ``count`` things a pruning rate removes.

    The rate is taken as the decimal number the user wrote: 0.145 of 1,000 is 145, though the nearest binary
    fraction lies below.
    """
    return math.floor(Fraction(repr(float(rate))) * count + Fraction(1, 2))


def check_removed(rate: float, count: int, what: str = "heads") -> int:
    """Return how many of ``count`` heads or units a rate removes, or raise `UserError` if one below 1 removes all."""
    removed = removed_count(rate, count)
    if removed >= count > 0 and rate < 1:  # of a sub-layer that is skipped already nothing is left to remove
        raise UserError(f"pruning rate {rate:g} removes all {count} {what}; the highest that leaves one is below "
                        f"{(count - 0.5) / count:g}, and 1 skips the sub-layer")
    return removed


def check_rates(configuration: Configuration, present: dict[str, int], where: str) -> None:
    """Raise `UserError` if a rate below 1 would remove every head of an attention, or unit of a feed-forward.

    Args:
        present: how many each has, `common.t5.header.Header.present`.
    """
    for name, rate in configuration.items():
        if name in present:
            try:
                check_removed(rate, present[name], "heads" if kind_of(name) == "attention" else "units")
            except UserError as error:
                raise UserError(f"{where}: {name}: {error}") from None


def rate_problem(name: str, value) -> str | None:
    """Say why a value out of a file is no pruning rate of a module, or return None.

    1 skips a whole sub-layer, an attention or a feed-forward; a linear module keeps some weights.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"pruning rate {brief(value)} is not a number"
    if kind_of(name) == "linear" and not 0 <= value < 1:
        return f"pruning rate {brief(value)} is not in [0, 1)"
    return None if 0 <= value <= 1 else f"pruning rate {brief(value)} is not in [0, 1]"


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
            elif problem := rate_problem(name, value):
                problems.append(f"configuration {n}: {name}: {problem}")
    refuse(path, problems)
    return [{name: float(value) for name, value in c.items()} for c in content]


def nth(configurations: list[Configuration], n: int, path: Path) -> Configuration:
    """Return configuration ``n`` (from 0), or raise `UserError` with the valid range."""
    if n >= len(configurations):
        raise UserError(f"{path}: there is no configuration {n}; it holds {len(configurations)}, numbered from 0 "
                        f"to {len(configurations) - 1}")
    return configurations[n]


def check_modules(names, kinds: dict[str, str], path: Path) -> None:
    """Raise `UserError` naming every module in ``names`` that the model (``kinds``) does not have."""
    refuse(path, [f"{name}: the model has no such module" for name in names if name not in kinds])


def required_variants(configuration: Configuration) -> dict[str, tuple[float, ...]]:
    """Return {block: rates of its members}, leaving out the blocks that stay as they are.

    Of a sub-layer that is skipped (rate 1) no other rate counts.
    """
    result = {}
    for name in configuration:
        if kind_of(name) == "feed-forward" and not configuration[name]:
            continue
        parent = parent_of(name)
        # A linear module of a feed-forward is a block of its own, unless hidden units are removed, too.
        block = parent if parent and (kind_of(parent) == "attention" or configuration.get(parent)) else name
        rates = tuple(float(configuration.get(m, 0.0)) for m in members(block))
        result[block] = (1.0,) + (0.0,) * (len(rates) - 1) if rates[0] == 1 else rates
    return {block: rates for block, rates in result.items() if any(rates)}
