"""The goal of a search."""

from __future__ import annotations

from dataclasses import dataclass

from duet_vlm.evaluation.tune.binomial import percent


@dataclass(frozen=True)
class Goal:
    """``keep``: share of the full model's right answers that has to stay, with 95 %; None: as much as can be had.
    ``speedup``: of the time to the first token, at least. ``memory``: bytes of weights, activations and cache for one
    prompt, at most."""

    keep: float | None = None
    speedup: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and not 0.5 <= self.keep < 1:
            raise ValueError(
                f"--keep {self.keep:g}: give a share from 0.5 to below 1 (no number of questions proves that nothing is ever lost)"
            )
        if self.speedup is not None and not 1 < self.speedup < 100:
            raise ValueError(f"--speedup {self.speedup:g}: give a number above 1, such as 1.5")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"--memory {self.memory:g}: give a size such as 24GB")

    def words(self) -> str:
        parts = (
            [f"at least {percent(self.keep)} of the right answers kept"]
            if self.keep is not None
            else ["as many right answers kept as possible"]
        )
        parts += [f"{self.speedup:g} times faster to the first token"] if self.speedup is not None else []
        parts += [f"within {self.memory / 1e9:.4g} GB"] if self.memory is not None else []
        return ", ".join(parts)
