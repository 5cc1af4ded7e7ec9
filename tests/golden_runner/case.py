"""A recorded case: its settings and tensors, and the account of what was compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# relative to the largest score of the tensor: a softmax row is rounded as a whole
SCORE = {"relative": 2e-5, "absolute": 0.0}  # two float32 sums over heads, queries and keys, each up to 1e-5 off
COARSE = {"relative": 1e-4, "absolute": 0.0}  # the same for recordings whose account allows more
STATE = {"relative": 0.0, "absolute": 1e-4}


class Case:
    """One json with its safetensors; remembers what was compared, so that ``finish`` finds what was not."""

    def __init__(self, path: Path) -> None:
        self.meta: dict[str, Any] = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.runs: dict[str, dict[str, Any]] = self.meta["runs"]
        self.config: dict[str, Any] = self.meta.get("config", {})
        self.compared: set[str] = set()
        self.errors: set[str] = set()

    # ---- reading

    def weights(self) -> dict[str, Tensor]:
        return {name.removeprefix("weights/"): t for name, t in self.tensors.items() if name.startswith("weights/")}

    def given(self, name: str) -> Tensor | None:
        return self.tensors.get(f"in/{name}")

    def has(self, run: str, name: str) -> bool:
        return f"out/{run}/{name}" in self.tensors

    def out(self, run: str, name: str) -> Tensor:
        return self.tensors[f"out/{run}/{name}"]

    def names(self, run: str, start: str = "") -> list[str]:
        """Names of the recorded tensors of a run."""
        prefix = f"out/{run}/"
        return sorted(name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix + start))

    # ---- comparing

    def same(self, run: str, name: str, ours: Tensor | list[int]) -> None:
        """Indices, masks, labels: equal."""
        expected, ours = self.out(run, name), torch.as_tensor(ours, dtype=torch.long)
        assert ours.shape == expected.shape, f"{run}/{name}: ours {tuple(ours.shape)}, recorded {tuple(expected.shape)}"
        equal(f"{run}/{name}", ours, expected)
        self.compared.add(f"out/{run}/{name}")

    def close(self, run: str, name: str, ours: Tensor, tolerance: dict[str, float] = STATE) -> None:
        """Floats: within the tolerance."""
        near(f"{run}/{name}", ours, self.out(run, name), tolerance)
        self.compared.add(f"out/{run}/{name}")

    def scores(self, run: str, name: str, ours: Tensor) -> None:
        self.close(run, name, ours, SCORE)

    def rows(
        self,
        run: str,
        name: str,
        ours: Tensor,
        valid: Tensor,
        compare: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> None:
        """Rows of real tokens of a padded batch: recorded on the right-padded side, ours [B, T, ...] where ``valid``
        [B, T]."""
        expected = self.out(run, name)
        lengths = valid.sum(1).tolist()
        assert expected.shape[:2] == (len(lengths), max(lengths)), (
            f"{run}/{name}: recorded {tuple(expected.shape)}, ours {lengths} rows"
        )
        for b, n in enumerate(lengths):
            (compare or near)(f"{run}/{name}[{b}]", ours[b][valid[b]], expected[b, :n])
        self.compared.add(f"out/{run}/{name}")

    def fact(self, run: str, name: str, ours: Any) -> None:
        """A number of the json, if it is there."""
        if name in self.runs[run]:
            assert self.runs[run][name] == ours, f"{run}: {name} is {ours}, recorded {self.runs[run][name]}"

    @contextmanager
    def official_error(self, run: str):
        """The released code stops here; ours says clearly why, or goes on to the result that the caller then checks."""
        assert not self.names(run), f"{run} is recorded as an error but has results"
        self.errors.add(run)
        try:
            yield
        except (ValueError, TypeError) as error:
            assert len(str(error)) > 20, f"{run}: unclear error {error!r}"

    def finish(self) -> None:
        """Nothing may be left over: no tensor, no run."""
        left = [name for name in self.tensors if name.startswith("out/") and name not in self.compared]
        assert not left, f"{len(left)} recorded tensors were not compared: {left[:10]}"
        assert self.runs, "the case has no runs"
        for run in self.runs:
            if run not in self.errors:
                assert any(name.startswith(f"out/{run}/") for name in self.compared), f"run {run} was not compared"


def near(name: str, ours: Tensor, expected: Tensor, tolerance: dict[str, float] = STATE) -> None:
    assert ours.shape == expected.shape, f"{name}: ours {tuple(ours.shape)}, recorded {tuple(expected.shape)}"
    if ours.numel():
        worst, largest = float((ours - expected).abs().max()), float(expected.abs().max())
        allowed = tolerance["absolute"] + tolerance["relative"] * largest
        assert worst <= allowed, (
            f"{name}: largest difference {worst:.3g}, allowed {allowed:.3g} (values up to {largest:.3g})"
        )


def equal(name: str, ours: Tensor, expected: Tensor) -> None:
    assert torch.equal(ours.long(), expected.long()), f"{name}: ours {ours.tolist()}, recorded {expected.tolist()}"
