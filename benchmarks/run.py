"""Run every speed benchmark and write one JSON file each to results/ (``--quick``: tiny shapes, to see that it works)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import decode
import greedy
import overhead
import prefill
import reentry
import t2v
import torch
import tower
import train_step
import v2v
from common import HERE, Options, say, write

BENCHMARKS = {
    "v2v": v2v.run, "greedy": greedy.run, "t2v": t2v.run, "decode": decode.run, "prefill": prefill.run, "tower": tower.run,
    "overhead": overhead.run, "train_step": train_step.run, "reentry": reentry.run,
}  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=None, help="default: what torch chooses")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args(words)
    unknown = sorted(set(given.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    options = Options(given.quick, given.out)
    if options.quick:
        print("quick: tiny shapes, figures mean nothing", file=sys.stderr)
    for name in given.names or BENCHMARKS:
        start = time.perf_counter()
        rows = BENCHMARKS[name](options)
        path = write(options, name, rows)
        say(rows)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
