"""A server that the command line starts, and what OpenAI's client asks it."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from cases import blobs
from PIL import Image

KEY = "a-key"
ENGINE = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--block-size",
    "32",
    "--max-num-seqs",
    "32",
    "--distributed-executor-backend",
    "uni",
]
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
FIRST = ("--budget", "16", "--request-budgets")
BOTH = ("--method", "duet", "--budget", "16", "--stages", "all")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(*arguments: str, model: str = "tiny") -> list[str]:
    return [str(Path(sys.executable).parent / "duet-vlm"), "serve", "--model", model, *arguments]


@contextlib.contextmanager
def server(
    port: int, log: Path, model: str = "tiny", reduction: tuple[str, ...] = FIRST, level: str = "ERROR"
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from when it is ready until it is stopped; ``level``: of what vLLM writes to ``log``."""
    run = command(*reduction, "--port", str(port), "--api-key", KEY, "--", *ENGINE, model=model)
    environment = os.environ | QUIET | {"VLLM_LOGGING_LEVEL": level}
    with log.open("wb") as file:
        process = subprocess.Popen(run, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended: {log.read_text()[-3000:]}")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                time.sleep(1)
            else:
                raise RuntimeError(f"the server is not ready after ten minutes: {log.read_text()[-3000:]}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:  # vLLM's engine, a process of its own, outlives a server that was killed
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def client(port: int, key: str = KEY) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=300)


def url(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def clip_url(frames: list[Image.Image]) -> str:
    """A clip as vLLM takes it without any codec: frames one by one."""
    held = [io.BytesIO() for _ in frames]
    for frame, one in zip(frames, held, strict=True):
        frame.save(one, "JPEG")
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(one.getvalue()).decode() for one in held)


PICTURES = [url(blobs(seed, 224, 224)) for seed in range(4)]


def ask(
    port: int,
    shown: tuple[str, ...] = (PICTURES[0],),
    text: str = "what colour is the circle?",
    model: str = "tiny",
    kind: str = "image_url",
    **more: Any,
) -> Any:
    content = [*({"type": kind, kind: {"url": each}} for each in shown), {"type": "text", "text": text}]
    messages: Any = [{"role": "user", "content": content}]
    extra = {"ignore_eos": True} | more.pop("extra", {})
    return client(port).chat.completions.create(
        model=model, messages=messages, max_tokens=4, temperature=0, extra_body=extra, **more
    )


def rows(port: int, **more: Any) -> int:
    return int(ask(port, **more).usage.prompt_tokens)


def metric(port: int, name: str) -> float:
    """A counter of the server, of all its labels together."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))
