"""lmms-eval: our model for it (``lmms-eval --model duet_vlm``), a task for it, and ``run``, which starts it and reads
its results."""

from duet_vlm.evaluation.lmms.launch import TASKS, run
from duet_vlm.evaluation.lmms.plugin import manifest

__all__ = ["TASKS", "manifest", "run"]
