"""Entry point of the model for lmms-eval's group ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any

MODEL = "duet_vlm"


def manifest() -> Any:
    """Location of the model class; lmms-eval calls this at start and imports the class only for ``--model
    duet_vlm``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path="duet_vlm.evaluation.lmms.model.DuetVLM")
