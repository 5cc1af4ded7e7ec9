"""Device sheets: peak rates of accelerators as their vendors state them, and those of this machine as measured here."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from duet_vlm.utils.suggest import did_you_mean

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """Peak rates of a device.

    Attributes
    ----------
    name : str
        Short name, as ``--device`` takes it.
    flops : dict of str to float
        Dense FLOP/s of matrix products by dtype.
    bandwidth : float
        Bytes/s of its memory.
    memory : float
        Bytes of its memory.
    source : str
        Origin of the numbers.
    measured : bool
        The numbers were reached in a measurement, so no efficiency is taken off them.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float
    source: str
    measured: bool = False

    def peak(self, dtype: str) -> float:
        """FLOP/s in ``dtype``.

        Raises
        ------
        ValueError
            If the sheet has no number for it.
        """
        if dtype not in self.flops:
            raise ValueError(f"--dtype {dtype}: the sheet of {self.name} has {', '.join(self.flops)}")
        return self.flops[dtype]


# dense figures (data sheets print twice as much "with sparsity"); fp32 without TF32, as torch multiplies by default
SHEETS = {
    device.name: device
    for device in (
        Device(
            "a100", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}, 2.039e12, 80e9, "NVIDIA A100 80GB SXM data sheet"
        ),
        Device(
            "h100",
            {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 67e12, "fp8": 1978.9e12},
            3.35e12,
            80e9,
            "NVIDIA H100 SXM data sheet",
        ),
        Device(
            "h200",
            {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 67e12, "fp8": 1978.9e12},
            4.8e12,
            141e9,
            "NVIDIA H200 SXM data sheet",
        ),
        Device(
            "mi300x",
            {"bf16": 1307.4e12, "fp16": 1307.4e12, "fp32": 163.4e12, "fp8": 2614.9e12},
            5.3e12,
            192e9,
            "AMD Instinct MI300X data sheet",
        ),
        Device(
            "l4",
            {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12, "fp8": 242.5e12},
            300e9,
            24e9,
            "NVIDIA L4 data sheet",
        ),
    )
}
THIS = "cpu"


def device(name: str) -> Device:
    """A sheet by name; "cpu" is this machine, measured once and cached.

    Raises
    ------
    ValueError
        If there is no such sheet.
    """
    if name == THIS:
        return this_machine()
    if name.lower() not in SHEETS:
        near = did_you_mean(name, SHEETS)
        raise ValueError(
            f"--device {name}: no sheet of that name{near}; choose {', '.join(SHEETS)} or {THIS} (this machine, "
            "measured)"
        )
    return SHEETS[name.lower()]


def this_machine(fresh: bool = False) -> Device:
    """This CPU with torch's current number of threads: products and memory reads, measured in a few seconds and kept in
    a cache file."""
    file = _cache() / f"cpu-{_processor()}-{torch.get_num_threads()}-threads-torch-{torch.__version__}.json"
    cached = None if fresh else _read(file)
    if cached is not None:
        return cached
    sheet = measured()
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")  # readers see the whole file or none
    unfinished.write_text(json.dumps(asdict(sheet), indent=1) + "\n")
    unfinished.replace(file)
    return sheet


def _read(file: Path) -> Device | None:
    """The device in a cache file; None if there is none, or none that can be parsed."""
    try:
        return Device(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _processor() -> str:
    """The model of this CPU as a part of a file's name: home folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next(
        (line.split(":", 1)[1] for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return "-".join(re.findall("[a-z0-9]+", name.lower()))


def measured(size: int = 512, rounds: int = 500, matrices: int = 32, width: int = 1536) -> Device:
    """Measure products of ``size`` x ``size`` in float32, and of one row with ``matrices`` of ``width`` x ``width`` as
    decoding computes them.

    Each of the matrices is read from memory; the share of the memory's speed that the kernel does not reach is no use
    to a model. Both are many short measurements of which the fast ones are taken: other work on the machine slows only
    some of them. The best of ``rounds`` products; the matrix that a quarter of the matrices beat.
    """
    a, b, c = (torch.randn(size, size, device="cpu") for _ in range(3))
    product = min(_seconds(lambda: torch.mm(a, b, out=c)) for _ in range(rounds))
    row, weights = torch.randn(1, width, device="cpu"), torch.randn(matrices, width, width, device="cpu")
    reads = sorted(_seconds(lambda w=weight: torch.mm(row, w.t())) for weight in weights)  # type: ignore[misc]
    bandwidth = 4 * width * width / reads[len(reads) // 4]
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    how = f"measured: best of {rounds} products of {size}, one row times {matrices} matrices of {width}"
    return Device(
        f"this CPU, {torch.get_num_threads()} threads", {"fp32": 2 * size**3 / product}, bandwidth, memory, how, True
    )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duet-vlm"
