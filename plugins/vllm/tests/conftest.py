"""Shared by the tests of the plug-in; they need vLLM and are run by `make test-vllm`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import engine
from cases import METHODS
from tiny import checksum, make

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "references").glob("*.json"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def wanted(family: str, checkpoints: dict[str, Path]) -> dict[str, list[Any]]:
    """Answers of transformers with these very weights."""
    reference = json.loads((Path(__file__).parent / "references" / f"{family}.json").read_text())
    assert checksum(checkpoints[family]) == reference["checksum"], (
        "the checkpoint is not the one of the reference: write it anew (reference.py)"
    )
    return dict(reference["answers"])


@pytest.fixture(scope="module")
def llm(family: str, checkpoints: dict[str, Path]) -> Iterator[Any]:
    made = engine.start(checkpoints[family], family, METHODS[family]["duet"])
    yield made
    made.llm_engine.engine_core.shutdown()
    del made
    gc.collect()
