"""Worth of the first stage on a server: stock vLLM beside vLLM with the plug-in, both up at once, asked in turn with
the same settings.

    python benchmarks/serve.py                                        # in the environment of make test-vllm: a random
    model, minutes on a CPU python benchmarks/serve.py --model llava-hf/llava-1.5-7b-hf -- --max-model-len 4096
    --gpu-memory-utilization 0.45    # on a GPU, both share it

Every request brings a picture that no cache knows. A round asks each side once at each concurrency; figures are medians
over rounds, ratios are made round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "plugins" / "vllm" / "tests"))

TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
SIDES: tuple[tuple[str, float | None], ...] = (
    ("stock", None),
    ("entry 1", 1.0),
    ("entry 1/3", 1 / 3),
    ("entry 1/9", 1 / 9),
)
CPU = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "32", "--max-model-len", "1024"]
CPU += ["--distributed-executor-backend", "uni"]
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
NEW = 16


@dataclass(frozen=True)
class Server:
    """A server that answers at ``port`` to the name ``model``."""

    port: int
    model: str

    def metric(self, name: str) -> float:
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30).read().decode()
        return sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"{name}[{{ ]", line))


@contextlib.contextmanager
def server(model: str, reduced: bool, options: list[str], log: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    stock = [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    ]
    ours = [
        "-m",
        "duet_vlm.cli.main",
        "serve",
        "-m",
        model,
        "-b",
        "1.0",
        "--port",
        str(port),
        "--request-budgets",
        "--",
        *options,
    ]
    with log.open("wb") as file:
        words, environment = [sys.executable, *(ours if reduced else stock)], QUIET | os.environ
        process = subprocess.Popen(
            words, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for _ in range(1800):
                if process.poll() is not None:
                    raise RuntimeError(f"a server ended: {log.read_text()[-6000:]}")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                time.sleep(1)
            yield Server(port, model)
        finally:
            process.terminate()
            try:
                process.wait(120)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


class Pictures:
    """Pictures that were not shown before."""

    def __init__(self, side: int) -> None:
        self.side, self.number = side, 0

    def next(self) -> str:
        from cases import blobs

        self.number += 1
        held = io.BytesIO()
        blobs(self.number, self.side, self.side).save(held, "PNG")
        return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


async def asked(client: Any, model: str, picture: str, share: float | None) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and the prompt's rows."""
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "What is shown here? Answer in a few words."},
    ]
    extra: dict[str, Any] = {"ignore_eos": True} | (
        {} if share is None else {"mm_processor_kwargs": {"duet_budget": share}}
    )
    began, first, rows = time.perf_counter(), 0.0, 0
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=NEW, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body=extra,
    )  # fmt: skip
    async for chunk in stream:
        if not first and chunk.choices:
            first = time.perf_counter() - began
        rows = chunk.usage.prompt_tokens if chunk.usage else rows
    return first, time.perf_counter() - began, rows


async def loaded(at: Server, pictures: list[str], share: float | None, concurrency: int) -> dict[str, float]:
    """``pictures`` asked about, ``concurrency`` at a time."""
    import openai

    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{at.port}/v1", api_key="none", max_retries=0, timeout=3600)
    gate, usage, going = asyncio.Semaphore(concurrency), [0.0], True

    async def one(picture: str) -> tuple[float, float, int]:
        async with gate:
            return await asked(client, at.model, picture, share)

    async def watch() -> None:
        while going:
            usage.append(await asyncio.to_thread(at.metric, "vllm:kv_cache_usage_perc"))
            await asyncio.sleep(0.2)

    async with client:
        watching = asyncio.create_task(watch())
        began = time.perf_counter()
        found = await asyncio.gather(*map(one, pictures))
        seconds, going = time.perf_counter() - began, False
        await watching
    return {
        "requests_per_second": len(found) / seconds,
        "tokens_per_second": len(found) * NEW / seconds,
        "first_token_seconds": statistics.median(first for first, _, _ in found),
        "prompt_rows": statistics.median(rows for _, _, rows in found),
        "kv_usage": max(usage),
    }


def measure(model: str, options: list[str], concurrencies: list[int], rounds: int, side: int) -> list[dict[str, Any]]:
    pictures, found = Pictures(side), {}
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        up = [
            stack.enter_context(server(model, reduced, options, Path(logs) / str(reduced))) for reduced in (False, True)
        ]
        for turn in range(-1, rounds):  # the first only warms up
            for concurrency in concurrencies if turn >= 0 else concurrencies[-1:]:
                for name, share in SIDES:
                    batch = [pictures.next() for _ in range(max(4, 2 * concurrency) if turn >= 0 else 4)]
                    result = asyncio.run(loaded(up[share is not None], batch, share, concurrency))
                    if turn >= 0:
                        found.setdefault((concurrency, name), []).append(result)
                        print(f"round {turn}, {concurrency} at once, {name}: {result}", file=sys.stderr)
    rows = []
    for (concurrency, name), results in found.items():
        row: dict[str, Any] = {"concurrency": concurrency, "side": name, "rounds": results}
        row |= {key: statistics.median(result[key] for result in results) for key in results[0]}
        stock = found[concurrency, "stock"]
        for key in ("requests_per_second", "first_token_seconds", "kv_usage"):
            ratios = [ours[key] / theirs[key] for ours, theirs in zip(results, stock, strict=True) if theirs[key]]
            row[f"{key}_to_stock"] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows


def named_as_on_the_hub(folder: Path) -> Path:
    """With the level of names that stock vLLM asks for, and newer transformers leaves out."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a folder or hub id; default: random weights, a decoder of 8 layers behind a small CLIP tower"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--side", type=int, default=336, help="of the pictures, in pixels")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serve.json")
    parser.add_argument("options", nargs="*", help="vLLM's, of both sides, behind --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            import tiny

            tiny.TEXT |= TEXT
            model = str(named_as_on_the_hub(tiny.make("llava", Path(folder))))
        rows = measure(model, given.options or CPU, given.concurrency, given.rounds, given.side)
    import torch
    import vllm

    import duet_vlm

    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    threads = os.environ.get("OMP_NUM_THREADS", "as many")
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {os.cpu_count()} cores, {threads} threads per server"
    )
    environment = {
        "duet_vlm": duet_vlm.__version__,
        "commit": commit,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device,
    }
    shape = {
        "model": given.model or "random LLaVA",
        "text": None if given.model else TEXT,
        "new_tokens": NEW,
        "side": given.side,
    }
    made = {
        "benchmark": "serve",
        "environment": environment | {"python": platform.python_version()},
        "shape": shape,
        "options": given.options or CPU,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(made | {"results": rows}, indent=1) + "\n")
    for row in rows:
        figures = f"{row['requests_per_second']:.2f} req/s, first token {row['first_token_seconds']:.2f} s, {row['prompt_rows']:.0f} rows"
        print(f"{row['concurrency']:>3} at once, {row['side']:<10} {figures}, KV peak {100 * row['kv_usage']:.1f} %")


if __name__ == "__main__":
    main()
