"""Commands under ``accelerate launch``, and what tests ask of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def launched(world: int, *words: str) -> subprocess.Popen[str]:
    """A verb of the command line in processes side by side; no GPU is looked for."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--num_processes",
        str(world),
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "duet_vlm.cli.main",
        *words,
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        launch, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said; nothing of it lives on."""
    try:
        said = process.communicate(timeout=240)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def kill_rank(process: subprocess.Popen[str], journal: Path, lines: int) -> tuple[int, str]:
    """SIGKILL to the rank that writes ``journal`` as soon as that has so many lines: what becomes of the launcher."""
    deadline = time.monotonic() + 120
    try:
        while not (journal.exists() and journal.read_text().count("\n") >= lines):
            assert process.poll() is None and time.monotonic() < deadline, "the rank never began"
            time.sleep(0.005)
        os.kill(int(journal.with_name(f"{journal.name}.lock").read_text()), signal.SIGKILL)
    finally:
        found = finished(process)
    return found
