#!/usr/bin/env python3
"""Feed every parser mutated files: each must be read or refused with a `UserError`, quickly and in little memory.

    python benchmarks/fuzz.py --inputs 100000 --json fuzz.json

Starts from valid files of every kind (a very small T5 and what the stages make of it). Mutations: flipped bits,
cuts, insertions, splices, swapped JSON values; where a checksum guards a file, most mutants get a valid one, so that
the checks behind it have to work. Prints inputs, accepted and refused for each parser. Anything else, a wrong
exception, 20 s or 4 GiB, saves the input and ends with exit code 1.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import mutants  # noqa: E402

SHARES = {"configuration": 20, "scheme": 18, "sensitivity": 8, "bank": 18, "statistics": 14, "corpus": 6,
          "packed corpus": 6, "checkpoint": 5, "model": 4, "hub folder": 1}
BYTES = 4 << 30


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--inputs", type=int, default=100_000, metavar="N", help="mutants altogether (default: 100000)")
    p.add_argument("--seed", type=int, default=0, metavar="INT")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = p.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        parsers = mutants.Parsers(Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        for kind, share in SHARES.items():
            rng, began, row = random.Random(f"{kind}/{args.seed}"), time.perf_counter(), {"parser": kind}
            row |= {"inputs": args.inputs * share // 100, "accepted": 0, "refused": 0, "failed": 0}
            for n in range(row["inputs"]):
                mutant = parsers.mutate(kind, rng)
                try:
                    message = parsers.outcome(kind, mutant)
                    problem = None if message is None else mutants.complaint(message)
                    row["accepted" if message is None else "refused"] += problem is None
                except BaseException as error:  # everything else is what we look for
                    problem = repr(error)[:300]
                    if isinstance(error, KeyboardInterrupt):
                        raise
                if problem:
                    row["failed"] += 1
                    saved = Path(f"fuzz-{kind.replace(' ', '-')}-{n}{parsers.paths[kind].suffix}")
                    saved.write_bytes(mutant)
                    print(f"{saved}: {problem}", flush=True)
            row["seconds"] = round(time.perf_counter() - began, 1)
            rows.append(row)
            bad += row["failed"]
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    total = {k: sum(r[k] for r in rows) for k in ("inputs", "accepted", "refused", "failed")}
    print("\n| parser | inputs | accepted | refused | failed |\n|---|---|---|---|---|")
    for r in [*rows, {"parser": "all"} | total]:
        print(f"| {r['parser']} | {r['inputs']:,} | {r['accepted']:,} | {r['refused']:,} | {r['failed']:,} |")
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "rows": rows}, indent=2) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
