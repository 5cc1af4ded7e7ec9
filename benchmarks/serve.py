"""Worth of fewer tokens on a server: stock vLLM beside vLLM with the plug-in, all up at once, asked in turn.

    python benchmarks/serve.py           # in the environment of make test-vllm: a random model, minutes on a CPU
    python benchmarks/serve.py --both    # the first stage alone and both stages at the same mean over decoder layers
    python benchmarks/serve.py --model llava-hf/llava-1.5-7b-hf -- --max-model-len 4096 --gpu-memory-utilization 0.45

The last is for a GPU, which two servers share there (three with --both: 0.3). Every request brings a picture that no
cache knows, except where one picture is asked about by all ("repeated"); with "system" all requests share a system
prompt. A round asks each side once in each case; figures are medians over rounds, ratios are made round by round. In
the last round four requests of each side are asked again, one by one: their answers should be the same.
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
from dataclasses import asdict, dataclass
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
ENGINES: dict[str, list[str] | None] = {  # options of duet-vlm serve; requests ask for less
    "stock": None,
    "plug-in": ["-b", "1.0"],
    "first": ["--method", "duet", "-b", "1.0"],
    "both": ["--method", "duet", "-b", "0.4", "--stages", "all"],
}
Side = tuple[str, str, float | None]  # its name, its engine, and the share of the visual tokens that requests ask for
ENTRIES: list[Side] = [
    ("stock", "stock", None),
    ("entry 1", "plug-in", 1.0),
    ("entry 1/3", "plug-in", 1 / 3),
    ("entry 1/9", "plug-in", 1 / 9),
]
MEANS: list[Side] = [
    ("stock", "stock", None),
    *((f"{stages} {share:.0%}", stages, share) for share in (0.33, 0.22, 0.11) for stages in ("first", "both")),
]
CPU = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "32", "--max-model-len", "1024"]
CPU += ["--distributed-executor-backend", "uni"]
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
NEW, LONG, AGAIN = 16, 64, 4
SYSTEM = "You look at pictures and answer questions about them in a few plain words. " * 4


@dataclass(frozen=True)
class Traffic:
    """Requests of one case: tokens to write, requests at once, and what they share: nothing ("fresh"), a system prompt
    ("system") or the picture ("repeated")."""

    new: int
    concurrency: int
    kind: str = "fresh"

    def pictures(self, pictures: Pictures, least: int = 4) -> list[str]:
        count = max(least, 3 * self.concurrency // 2)
        return [pictures.next()] * count if self.kind == "repeated" else [pictures.next() for _ in range(count)]


@dataclass(frozen=True)
class Server:
    """A server that answers at ``port`` to the name ``model``."""

    port: int
    model: str

    def metric(self, name: str) -> float:
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30).read().decode()
        return sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"{name}[{{ ]", line))


@contextlib.contextmanager
def server(model: str, reduction: list[str] | None, options: list[str], log: Path) -> Iterator[Server]:
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
        *(reduction or ()),
        "--port",
        str(port),
        "--request-budgets",
        "--",
        *options,
    ]
    with log.open("wb") as file:
        words, environment = [sys.executable, *(stock if reduction is None else ours)], QUIET | os.environ
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


async def asked(client: Any, model: str, picture: str, share: float | None, case: Traffic) -> tuple[float, int, str]:
    """Seconds to the first token, rows of the prompt, and the answer."""
    system = [{"role": "system", "content": SYSTEM}] if case.kind == "system" else []
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "What is shown here? Answer in a few words."},
    ]
    extra: dict[str, Any] = {"ignore_eos": True} | (
        {} if share is None else {"mm_processor_kwargs": {"duet_budget": share}}
    )
    began, first, rows, written = time.perf_counter(), 0.0, 0, []
    stream = await client.chat.completions.create(
        model=model, messages=[*system, {"role": "user", "content": content}], max_tokens=case.new, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body=extra,
    )  # fmt: skip
    async for chunk in stream:
        if not first and chunk.choices:
            first = time.perf_counter() - began
        rows = chunk.usage.prompt_tokens if chunk.usage else rows
        written += [choice.delta.content or "" for choice in chunk.choices]
    return first, rows, "".join(written)


def client_of(at: Server) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{at.port}/v1", api_key="none", max_retries=0, timeout=3600)


async def loaded(at: Server, pictures: list[str], share: float | None, case: Traffic, again: int) -> dict[str, float]:
    """``pictures`` asked about as the case says; then ``again`` of them one by one."""
    gate, usage, going = asyncio.Semaphore(case.concurrency), [0.0], True

    async def one(picture: str) -> tuple[float, int, str]:
        async with gate:
            return await asked(client, at.model, picture, share, case)

    async def watch() -> None:
        while going:
            usage.append(await asyncio.to_thread(at.metric, "vllm:kv_cache_usage_perc"))
            await asyncio.sleep(0.2)

    async with client_of(at) as client:
        watching = asyncio.create_task(watch())
        began = time.perf_counter()
        found = await asyncio.gather(*map(one, pictures))
        seconds, going = time.perf_counter() - began, False
        await watching
        alone = [(await asked(client, at.model, picture, share, case))[2] for picture in pictures[:again]]
    return {
        "requests_per_second": len(found) / seconds,
        "tokens_per_second": len(found) * case.new / seconds,
        "first_token_seconds": statistics.median(first for first, _, _ in found),
        "prompt_rows": statistics.median(rows for _, rows, _ in found),
        "kv_usage": max(usage),
        "asked_again": again,
        "answers_equal": sum(one == both for one, (_, _, both) in zip(alone, found, strict=False)),
    }


def measure(
    model: str, options: list[str], sides: list[Side], cases: list[Traffic], rounds: int, side: int
) -> list[dict[str, Any]]:
    pictures, found = Pictures(side), {}
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        up = {
            engine: stack.enter_context(server(model, ENGINES[engine], options, Path(logs) / engine))
            for engine in dict.fromkeys(engine for _, engine, _ in sides)
        }
        for turn in range(-1, rounds):  # the first only warms up
            for case in cases if turn >= 0 else cases[:1]:
                for name, engine, share in sides:
                    batch = case.pictures(pictures)
                    again = AGAIN if turn == rounds - 1 else 0
                    result = asyncio.run(loaded(up[engine], batch, share, case, again))
                    if turn >= 0:
                        found.setdefault((case, name), []).append(result)
                        print(f"round {turn}, {case}, {name}: {result}", file=sys.stderr)
    rows = []
    for (case, name), results in found.items():
        row: dict[str, Any] = asdict(case) | {"side": name, "rounds": results}
        row |= {key: statistics.median(result[key] for result in results) for key in results[0]}
        row |= {key: sum(result[key] for result in results) for key in ("asked_again", "answers_equal")}
        stock = found[case, "stock"]
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


def environment() -> dict[str, str]:
    """Versions, commit and device."""
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
    return {
        "duet_vlm": duet_vlm.__version__,
        "commit": commit,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a folder or hub id; default: random weights, a decoder of 8 layers behind a small CLIP tower"
    )
    parser.add_argument("--both", action="store_true", help="both stages and the first alone at equal means")
    parser.add_argument(
        "--answers", type=int, nargs="+", help=f"tokens to write; default {NEW}, with --both also {LONG}"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--side", type=int, default=336, help="of the pictures, in pixels")
    parser.add_argument("--out", type=Path, help="default: results/serve.json, with --both serve_stages.json")
    parser.add_argument("options", nargs="*", help="vLLM's, of both sides, behind --")
    given = parser.parse_args()
    answers = given.answers or ([NEW, LONG] if given.both else [NEW])
    out = given.out or HERE / "results" / ("serve_stages.json" if given.both else "serve.json")
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            import tiny

            tiny.TEXT |= TEXT
            model = str(named_as_on_the_hub(tiny.make("llava", Path(folder))))
        sides = MEANS if given.both else ENTRIES
        cases = [Traffic(new, concurrency) for new in answers for concurrency in given.concurrency]
        if given.both:
            cases += [
                Traffic(answers[0], concurrency, kind) for kind in ("system", "repeated") for concurrency in (1, 8)
            ]
        rows = measure(model, given.options or CPU, sides, cases, given.rounds, given.side)
    shape = {"model": given.model or "random LLaVA", "text": None if given.model else TEXT, "side": given.side}
    shape["new_tokens"] = answers[0]
    made = {
        "benchmark": "serve",
        "environment": environment(),
        "shape": shape,
        "options": given.options or CPU,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(made | {"results": rows}, indent=1) + "\n")
    for row in rows:
        figures = f"{row['requests_per_second']:.2f} req/s, first token {row['first_token_seconds']:.2f} s"
        figures += f", {row['prompt_rows']:.0f} rows, KV peak {100 * row['kv_usage']:.1f} %"
        equal = f"{row['answers_equal']} of {row['asked_again']} answers as alone"
        place = f"{row['new']:>4} tokens, {row['concurrency']:>3} at once, {row['kind']:<8} {row['side']:<10}"
        print(f"{place} {figures}, {equal}")


if __name__ == "__main__":
    main()
