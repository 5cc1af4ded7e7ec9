"""What lmms-eval's entry-point group ``lmms_eval.models`` asks for."""

from __future__ import annotations

from typing import Any

MODEL = "duet_vlm"


def manifest() -> Any:
    """Where the model class is; lmms-eval calls this at start and imports the class only for ``--model duet_vlm``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path="duet_vlm.evaluation.lmms.model.DuetVLM")
