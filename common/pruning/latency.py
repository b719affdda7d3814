"""Predict how long a pruned model takes to translate: a time for each sub-layer by the heads or units it keeps.

Whole translations of one text are timed: by a network without any sub-layer, and by networks with those of one kind,
all of which keep n heads or units. What they take longer is the time of these sub-layers. All give the translations of
the original, so that they differ in size alone; their weights, which no time depends on, are random. The search then
takes seconds in the place of weights, as ZipLM (Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of
Language Models") and Puzzle (Bercovich et al. 2024, "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs") do.
"""

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, brief
from common.files.atomic import write_bytes
from common.files.jsonfile import read_measurement, sealed
from common.pruning.bank import Bank, Key
from common.pruning.configurations import removed_count
from common.pruning.timing import full, side_by_side, thinned, translations
from common.runtime import progress
from common.t5.model import Model
from common.t5.modules import kind_of, prunable
from common.t5.network import initialize
from common.t5.shrink import used
from common.text.batches import TRANSLATED_TOKENS, Batches, source_text
from common.text.corpus import Corpus, read_pairs, sample

VERSION = 2  # 1: other batches
SENTENCES = 1000  # of validation text, that are translated; in batches of 400 cross-attention takes 1.25 times as long
LARGEST = 1e6  # seconds that a file may hold
ROUNDS, SECONDS = 3, 100  # every network translates so often at least, and on until so many seconds have passed
KINDS = {"encoder.SelfAttention": "encoder self-attention", "encoder.DenseReluDense": "encoder feed-forward",
         "decoder.SelfAttention": "decoder self-attention", "decoder.EncDecAttention": "cross-attention",
         "decoder.DenseReluDense": "decoder feed-forward"}


def kind(sublayer: str) -> str:
    """Return which of `KINDS` the sub-layer of this name is."""
    return KINDS[f"{sublayer.split('.')[0]}.{sublayer.split('.')[-1]}"]


@dataclass
class Latency:
    """What `measure` found.

    Attributes:
        fixed: seconds of what no pruning changes: embeddings, lm_head, the search for words.
        seconds: {kind of sub-layer: {heads or units kept: seconds of one such sub-layer}}: none, one, all.
        measured_on: machine, threads, text, as `conditions` gives them.
    """

    fixed: float
    seconds: dict[str, dict[int, float]]
    measured_on: dict

    def of(self, sublayer: str, kept: int) -> float:
        """Return the seconds of a sub-layer that keeps so many heads or units; linear between what was measured."""
        table = self.seconds[kind(sublayer)]
        return float(np.interp(kept, list(table), list(table.values())))

    def differences(self, device) -> str:
        """Return what is not as it was when this was measured, as text; empty if nothing."""
        return ", ".join(f"{key} {brief(self.measured_on.get(key))}, now {value!r}"
                         for key, value in conditions(device).items() if self.measured_on.get(key) != value)


def conditions(device) -> dict:
    """Return what a time depends on besides model and text."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name") and ": " in line), name)
    return {"processor": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "batch_tokens": TRANSLATED_TOKENS}


def _line(measured: dict[int, float]) -> dict[int, float]:
    """Return the ends of the line through measured seconds, and 0 for a sub-layer that is skipped.

    What a sub-layer takes is a little for calls, however small they are, and grows with the heads or units.
    """
    least, most = min(measured), max(measured)
    slope, start = np.polyfit(list(measured), list(measured.values()), 1) if least < most else (0.0, measured[most])
    first = max(float(start + slope * least), 1e-9)
    return {0: 0.0, least: first} | {most: max(float(start + slope * most), first)}


def text_of(corpus: Corpus, model: Model) -> Batches:
    """Return the text to `measure` with, in batches as evaluate.py translates it."""
    return source_text(sample(read_pairs(corpus, "val"), SENTENCES, 0), model)


def measure(model: Model, text: Batches, device) -> Latency:
    """Time translations of a text with networks of the model's shape; ``model`` is not changed.

    Args:
        model: the original, its network on ``device``.
    """
    known, whole = translations(model, text, device), initialize(model.network)
    groups: dict[str, dict[str, int]] = {}
    for name, what in prunable(whole).items():
        if what != "linear":
            groups.setdefault(kind(name), {})[name] = full(whole.config, name)
    wanted = {(name, n): dict.fromkeys(sublayers, n) for name, sublayers in groups.items()
              for most in (max(sublayers.values()),) for n in sorted({1, -(-most // 2), most})}
    wanted["all", 0] = {name: n for sublayers in groups.values() for name, n in sublayers.items()}
    networks = {key: thinned(whole, kept).to(device) for key, kept in wanted.items()}
    empty = thinned(whole, {}).to(device)
    rounds, began = {key: [] for key in networks}, time.perf_counter()
    while len(rounds["all", 0]) < ROUNDS or time.perf_counter() - began < SECONDS:
        for key in progress(networks, "timing networks"):
            rounds[key].append(side_by_side((networks[key], empty), known, model, text, device))
    # Of each turn the least: what else a machine does only adds to it. That halves the deviation of a median of rounds.
    least = {key: [float(np.min(turns, axis=0).sum()) for turns in zip(*found, strict=True)]
             for key, found in rounds.items()}
    fixed = float(np.median([alone for _, alone in least.values()]))
    more = {key: fixed * max(seconds / alone - 1, 0.0) for key, (seconds, alone) in least.items()}
    table = {name: _line({n: s / len(groups[name]) for (which, n), s in more.items() if which == name})
             for name in groups}
    # Together sub-layers take another time than apart, since they share caches.
    scale = more["all", 0] / sum(len(groups[name]) * max(rows.values()) for name, rows in table.items())
    table = {name: {n: s * scale for n, s in rows.items()} for name, rows in table.items()}
    tokens = {"sentences": len(text), "source_tokens": sum(len(e.source) for e in text.dataset.examples),
              "target_tokens": sum(int((ids != whole.config.eos_token_id).sum()) + len(ids) for ids in known)}
    return Latency(fixed, table, conditions(device) | tokens)


def check_bank(bank: Bank) -> None:
    """Raise `UserError` if no variant of a bank saves time."""
    if not any(kind_of(block) != "linear" and rates[0] for block, rates in bank.entries):
        raise UserError(f"{bank.path}: its variants leave out single weights, which saves no time; what does are "
                        "heads, hidden units and whole sub-layers: config_generator.py --attention 0.25 0.5 0.75 1 1 "
                        "--feed-forward 0.25 0.5 0.75 0.9 1 makes configurations for a bank of them")


def saved(latency: Latency, model: Model, bank: Bank) -> tuple[dict[Key, int], int]:
    """Return how many nanoseconds each variant of a bank saves, and how many the original takes."""
    there = {name: int(mask.sum()) for name, mask in used(model.network).items()}
    before = {name: latency.of(name, count) for name, count in there.items()}
    found = dict.fromkeys(bank.entries, 0)
    for block, rates in found:
        if block in there:
            left = there[block] - removed_count(rates[0], there[block])
            found[block, rates] = round(1e9 * (before[block] - latency.of(block, left)))
    return found, round(1e9 * (latency.fixed + sum(before.values())))


def write(path: Path, latency: Latency, origin: dict[str, str]) -> None:
    """Write a measurement, sealed as a scheme is; ``origin`` says what of, {role: SHA-256}."""
    write_bytes(path, sealed({
        "format": "composable-pruning latency", "version": VERSION, "of": origin, "measured_on": latency.measured_on,
        "fixed": latency.fixed, "seconds": {name: list(map(list, t.items())) for name, t in latency.seconds.items()}}))


def read(path: Path, origin: dict[str, str]) -> Latency:
    """Read a measurement; it must be of this model and text.

    Raises:
        UserError: it is none, is damaged, or is of something else, with both hashes.
    """
    content = read_measurement(path, "latency", VERSION, origin)
    try:
        table = {name: {int(kept): float(s) for kept, s in content["seconds"][name]} for name in KINDS.values()}
        found = Latency(float(content["fixed"]), table, dict(content["measured_on"]))
    except (LookupError, TypeError, ValueError, OverflowError):
        found = None
    if not found or not all(rows and 0 <= min(rows.values()) <= max(rows.values()) < LARGEST
                            for rows in [{0: found.fixed}, *table.values()]):
        raise UserError(f"{path}: does not list a time for every kind of sub-layer; remove it, it is measured anew")
    return found
