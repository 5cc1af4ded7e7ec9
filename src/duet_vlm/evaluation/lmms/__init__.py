"""lmms-eval: our model for it (``lmms-eval --model duet_vlm``), and the folder of a task for it (``--include_path``)."""

from pathlib import Path

from duet_vlm.evaluation.lmms.plugin import manifest

TASKS = Path(__file__).parent / "tasks"

__all__ = ["TASKS", "manifest"]
