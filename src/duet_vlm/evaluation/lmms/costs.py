"""Cost of a whole run, summed over its batches: measured at the layers' inputs, beside the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duet_vlm import Report


@dataclass
class PromptCosts:
    """Sums over the batches of one task that held images.

    Attributes
    ----------
    prompts, images, tokens : int
        Prompts, images, and their visual tokens unreduced.
    nominal, measured : float
        Visual tokens per decoder layer, planned and measured, summed over the prompts.
    full_flops, flops : int
        FLOPs of the full model, and of the run.
    full_kv_bytes, kv_bytes : int
        Bytes of the KV cache of the full model, and of the run.
    """

    prompts: int = 0
    images: int = 0
    tokens: int = 0
    nominal: float = 0.0
    measured: float = 0.0
    full_flops: int = 0
    flops: int = 0
    full_kv_bytes: int = 0
    kv_bytes: int = 0

    def add(self, report: Report, images: int) -> None:
        """Count one batch of ``images`` images."""
        self.prompts += report.batch
        self.images += images
        self.tokens += report.tokens
        self.nominal += report.nominal_mean * report.batch
        self.measured += report.measured_mean * report.batch
        self.full_flops += report.full.flops
        self.flops += report.observed.flops
        self.full_kv_bytes += report.full.kv_bytes or 0
        self.kv_bytes += report.observed.kv_bytes or 0

    def to_json(self) -> dict[str, Any]:
        """Means per image (visual tokens per decoder layer) and per prompt (prefill FLOPs, bytes of the KV cache)."""
        images, prompts = max(self.images, 1), max(self.prompts, 1)
        return {
            "prompts": self.prompts,
            "images": self.images,
            "tokens_per_image": self.tokens / images,
            "nominal_mean": self.nominal / images,
            "measured_mean": self.measured / images,
            "full_gflops": self.full_flops / prompts / 1e9,
            "gflops": self.flops / prompts / 1e9,
            "full_kv_bytes": self.full_kv_bytes / prompts,
            "kv_bytes": self.kv_bytes / prompts,
        }

    def __str__(self) -> str:
        if not self.images:
            return "no images"
        values = self.to_json()
        return (
            f"{self.images} images of {values['tokens_per_image']:.6g} visual tokens: mean per decoder layer "
            f"nominal {values['nominal_mean']:.2f}, measured {values['measured_mean']:.2f}; "
            f"prefill GFLOPs per prompt {values['gflops']:.3f} of {values['full_gflops']:.3f}"
        )
