"""Time from shapes: every stage takes what its products need at the device's speed or what its bytes need at the
memory's, the larger.

A prediction, to plan with: it knows nothing of a kernel. What it assumes is in ``Assumptions``, all of it printed by
``python -m duet_vlm_lab.fleet``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from duet_vlm.planning.budget import SpanPlan, largest_int
from duet_vlm.profiling.flops import (
    decoder_layer_flops,
    head_flops,
    mean_rows,
    projector_flops,
    scoring_flops,
    tower_flops,
)
from duet_vlm.profiling.kv import kv_bytes_per_layer, rows_held, state_bytes
from duet_vlm.profiling.memory import mlp_width, request_bytes
from duet_vlm.profiling.model_dims import LINEAR, DecoderDims, VisionDims
from duet_vlm.profiling.report import SampleCounts
from duet_vlm_lab.roofline.devices import ELEMENT_BYTES, Device
from duet_vlm_lab.roofline.weights import decoder_weights, layer_weights, vision_weights


@dataclass(frozen=True)
class Assumptions:
    """Assumed efficiencies, which no data sheet gives.

    Attributes
    ----------
    compute, bandwidth : float
        Shares of the sheet's FLOP/s and bytes/s that large products and streams reach. Measured devices: 1.
    causal : float
        Share of the rectangle of queries by keys that the prompt's attention kernel works on.
    launch : float
        Seconds that the host needs per layer and pass where nothing else hides it (0: a compiled engine or CUDA graphs;
        transformers in eager mode needs 0.3 ms and more per layer, which bounds its decoding at small batches).
    hidden_touches, mlp_touches : float
        Number of times that norms, residuals, rotation and activations read or write a row of the hidden and of the
        MLP's width, per layer.
    usable : float
        Share of the device's memory that a model may fill.
    parallel : float
        Speed of n devices that share one model, over n times one of them.
    """

    compute: float = 0.6
    bandwidth: float = 0.8
    causal: float = 0.5
    launch: float = 0.0
    hidden_touches: float = 20.0
    mlp_touches: float = 5.0
    usable: float = 0.9
    parallel: float = 0.85

    @classmethod
    def of(cls, device: Device) -> Assumptions:
        return cls(compute=1.0, bandwidth=1.0) if device.measured else cls()


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a model's parts, and the number of its weights (counted from the sizes if left out)."""

    decoder: DecoderDims
    vision: VisionDims
    weights: int = 0

    @property
    def numbers(self) -> int:
        return self.weights or decoder_weights(self.decoder) + vision_weights(self.vision, self.vision.towers)


@dataclass(frozen=True)
class Workload:
    """One request.

    Attributes
    ----------
    sample : SampleCounts
        The prompt.
    new : int
        Tokens to write: the prompt's pass gives the first, each further one takes a step.
    scored_layers, reused_layers : tuple of int
        Layers that rank; those among them that reuse the keys of their ranking.
    projects_all : bool
        As in ``make_report``.
    selection, selection_bytes : int
        FLOPs and bytes of the selection before the decoder (in float32).
    deciding, products, cut, scores_after_drop, ranks_all
        As in ``make_report``.
    """

    sample: SampleCounts
    new: int
    scored_layers: tuple[int, ...] = ()
    projects_all: bool = True
    selection: int = 0
    selection_bytes: int = 0
    reused_layers: tuple[int, ...] = ()
    deciding: int = 0
    products: bool = True
    cut: bool = False
    scores_after_drop: bool = False
    ranks_all: bool = False

    @property
    def steps(self) -> int:
        """Passes of the decoder over one new token each."""
        return max(0, self.new - 1)

    @property
    def tokens(self) -> int:
        return sum(self.sample.spans)

    @property
    def entry(self) -> int:
        return self.sample.text + sum(plan.entry for plan in self.sample.plans)

    def rows(self, depth: int) -> list[int]:
        """Tokens at the input of each decoder layer."""
        return [self.sample.text + sum(plan.counts[layer] for plan in self.sample.plans) for layer in range(depth)]

    def full(self) -> Workload:
        """The same request to the untouched model."""
        depth = len(self.sample.plans[0].counts) if self.sample.plans else 0
        whole = tuple(SpanPlan(n, n, 0, (n,) * depth) for n in self.sample.spans)
        return Workload(replace(self.sample, plans=whole, skipped=False), self.new)


@dataclass(frozen=True)
class StageTime:
    """One stage of the work: its FLOPs, the bytes it moves, its seconds, and their ``bound``."""

    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Prediction:
    """Predicted time of a batch of equal requests.

    Attributes
    ----------
    batch, new : int
        Requests, and new tokens of each.
    devices : int
        Devices that share one model.
    vision, selection, prefill, decode : StageTime
        Tower and projector; the selection after them; the prompt in the decoder, with the first token; all further
        tokens.
    memory : float
        Bytes at the peak.
    max_batch : int
        The largest batch that fits on these devices.
    """

    batch: int
    new: int
    devices: int
    vision: StageTime
    selection: StageTime
    prefill: StageTime
    decode: StageTime
    memory: float
    max_batch: int

    @property
    def total(self) -> float:
        return self.first_token + self.decode.seconds

    @property
    def first_token(self) -> float:
        return self.vision.seconds + self.selection.seconds + self.prefill.seconds

    @property
    def step(self) -> float:
        """Seconds of one step of decoding; 0 without any."""
        return self.decode.seconds / (self.new - 1) if self.new > 1 else 0.0

    @property
    def requests_per_second(self) -> float:
        return self.batch / self.total

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.new / self.total

    def devices_for(self, requests_per_second: float) -> int:
        """Devices that serve so many requests per second, in whole copies of the model."""
        return math.ceil(requests_per_second / self.requests_per_second) * self.devices


def predict(
    model: ModelCost,
    work: Workload,
    device: Device,
    dtype: str = "bf16",
    batch: int = 1,
    assumed: Assumptions | None = None,
) -> Prediction:
    """Predict a batch of ``batch`` equal requests, on as few devices (1, 2, 4, ...) as hold it.

    Raises
    ------
    ValueError
        If the device's sheet lacks ``dtype``, or no 1,024 devices hold the batch.
    """
    assumed = assumed or Assumptions.of(device)
    size = ELEMENT_BYTES[dtype]
    memory = memory_bytes(model, work, size, batch)
    devices = next((n for n in (2**i for i in range(11)) if memory <= n * device.memory * assumed.usable), None)
    if devices is None:
        raise ValueError(
            f"batch={batch}: {memory / 1e9:.0f} GB do not fit on 1,024 devices of {device.memory / 1e9:.0f} GB"
        )
    speed = _DeviceSpeed(device, dtype, assumed, devices)
    max_batch = largest_int(
        2**20, lambda n: memory_bytes(model, work, size, n) <= devices * device.memory * assumed.usable
    )
    return Prediction(
        batch=batch, new=work.new, devices=devices, vision=_vision(model, work, speed, batch),
        selection=speed.exact(batch * work.selection, batch * work.selection_bytes),
        prefill=_prefill(model, work, speed, batch), decode=_decode(model, work, speed, batch), memory=memory,
        max_batch=max_batch,
    )  # fmt: skip


def memory_bytes(model: ModelCost, work: Workload, element_bytes: int, batch: int) -> float:
    """Bytes of a batch of equal requests (``profiling.memory.request_bytes``)."""
    return request_bytes(
        model.decoder, model.vision, model.numbers, work.sample, work.new, element_bytes, cut=work.cut, batch=batch
    )


class _DeviceSpeed:
    """Rates of ``devices`` devices under the assumptions, and the time of work at these rates."""

    def __init__(self, device: Device, dtype: str, assumed: Assumptions, devices: int) -> None:
        self.size, self.assumed = ELEMENT_BYTES[dtype], assumed
        together = devices * (assumed.parallel if devices > 1 else 1.0)
        self.flops = device.peak(dtype) * assumed.compute * together
        self.exact_flops = device.peak("fp32") * assumed.compute * together
        self.bytes = device.bandwidth * assumed.bandwidth * together

    def exact(self, flops: float, moved: float) -> StageTime:
        """Time of products in float32, and of bytes that do not overlap with them."""
        compute, stream = flops / self.exact_flops, moved / self.bytes
        return StageTime(flops, moved, compute + stream, "compute" if compute > stream else "memory")

    def layer(self, flops: float, weights: float, touched: float, launches: int = 1) -> StageTime:
        """Time of products with ``weights`` numbers, and of ``touched`` numbers that no product hides."""
        compute, stream = flops / self.flops, weights * self.size / self.bytes
        seconds, launch = max(compute, stream) + touched * self.size / self.bytes, self.assumed.launch * launches
        bound = (
            "host"
            if launch > seconds
            else "compute"
            if compute > stream + touched * self.size / self.bytes
            else "memory"
        )
        return StageTime(flops, (weights + touched) * self.size, max(seconds, launch), bound)


def _sum(stages: Sequence[StageTime]) -> StageTime:
    by_bound = {stage.bound: sum(s.seconds for s in stages if s.bound == stage.bound) for stage in stages}
    bound = max(by_bound, key=lambda bound: by_bound[bound])
    return StageTime(sum(s.flops for s in stages), sum(s.bytes for s in stages), sum(s.seconds for s in stages), bound)


def _vision(model: ModelCost, work: Workload, speed: _DeviceSpeed, batch: int) -> StageTime:
    """Tower and projector of the whole batch."""
    parts = work.sample.parts()
    if not parts:
        return StageTime(0, 0, 0.0, "-")
    shape = model.vision.read() if work.sample.skipped else model.vision
    tower_parts = work.sample.in_tower()
    rows = sum(mean_rows(shape, n, grid, stages) for n, grid, stages, _ in tower_parts)
    projected = (
        sum(work.sample.reaching_projector()) if work.projects_all else sum(plan.entry for plan in work.sample.plans)
    )
    flops = tower_flops(shape, tower_parts) + projector_flops(shape, projected)
    touched = rows * shape.layers * (speed.assumed.hidden_touches * shape.width + speed.assumed.mlp_touches * shape.mlp)
    return speed.layer(batch * flops, vision_weights(shape), batch * touched, shape.layers)


def _prefill(model: ModelCost, work: Workload, speed: _DeviceSpeed, batch: int) -> StageTime:
    shape, assumed = model.decoder, speed.assumed
    stages = []
    for layer, rows in enumerate(work.rows(shape.layers)):
        square = 0 if shape.kind(layer) == LINEAR else 4 * rows * rows * shape.wide
        share = min(assumed.causal, shape.seen(rows, layer) / rows) if rows else 0.0
        flops = decoder_layer_flops(shape, rows, layer=layer) - square * (1 - share)
        touched = rows * _touched(shape, layer, assumed)
        stages.append(speed.layer(batch * flops, layer_weights(shape, layer, batch * rows), batch * touched))
    before = [work.entry, *work.rows(shape.layers)]
    # projections as in a layer, then float32 scores of each query and row, touched some six times
    for layer in work.scored_layers:
        rows, queries, reused = (
            before[0 if work.ranks_all else layer + work.scores_after_drop],
            work.sample.queries,
            before[layer + 1] if layer in work.reused_layers else 0,
        )
        projections = scoring_flops(shape, rows, queries, reused, products=False, layer=layer)
        product = scoring_flops(shape, rows, queries, reused, work.products, layer) - projections
        weights = shape.hidden * _made_width(shape, layer, bool(reused))
        stages.append(speed.layer(batch * projections, weights, batch * 2 * rows * shape.hidden))
        stages.append(speed.exact(batch * product, batch * 24 * shape.heads * queries * rows * work.products))
    if work.deciding:
        stages.append(speed.exact(batch * work.deciding, 0))
    stages.append(speed.layer(batch * head_flops(shape, 1), shape.hidden * shape.vocab, 0, 0))
    return _sum(stages)


def _made_width(shape: DecoderDims, layer: int, reused: bool) -> int:
    """Channels that ranking computes per row; reused keys are counted with the layer."""
    if shape.kind(layer) == LINEAR and shape.linear is not None:
        return shape.linear.mixed + shape.linear.value_heads
    return shape.query_width + (0 if reused else shape.narrow)


def _decode(model: ModelCost, work: Workload, speed: _DeviceSpeed, batch: int) -> StageTime:
    """All steps, each at the cache's mean length."""
    shape, size, steps = model.decoder, speed.size, work.steps
    lengths = [rows + steps // 2 for rows in rows_held(shape, work.rows(shape.layers), work.cut)]
    cache_bytes = kv_bytes_per_layer(shape, lengths, size)
    state = state_bytes(shape, size) / shape.layers
    stages = []
    for layer, length in enumerate(lengths):
        flops = decoder_layer_flops(shape, 1, shape.seen(length + 1, layer), layer)
        moved = layer_weights(shape, layer, batch) + batch * (cache_bytes[layer] + 2 * state) / size
        stages.append(speed.layer(batch * flops, moved, batch * _touched(shape, layer, speed.assumed)))
    stages.append(speed.layer(batch * head_flops(shape, 1), shape.hidden * shape.vocab, 0, 0))
    step = _sum(stages)
    return StageTime(step.flops * steps, step.bytes * steps, step.seconds * steps, step.bound)


def _touched(shape: DecoderDims, layer: int, assumed: Assumptions) -> float:
    """Numbers that elementwise work reads or writes per row of a layer."""
    return assumed.hidden_touches * shape.hidden + assumed.mlp_touches * mlp_width(shape, layer)
