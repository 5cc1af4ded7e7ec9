"""Five minutes of 32 clients at a server with both stages, some of whom give up; then a SIGKILL, and a new server.

    python benchmarks/serve_soak.py            # in the environment of make test-vllm

What is asked, and what counts as lost, is in ``plugins/vllm/tests/soak.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import serve
import soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=serve.HERE / "results" / "serve_soak.json")
    given = parser.parse_args()
    made = {"benchmark": "serve_soak", "environment": serve.environment()} | soak.soaked(given.seconds)
    given.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
