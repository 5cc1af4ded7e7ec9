"""The models of the plug-in, as far as drops inside their decoders go."""

from __future__ import annotations

from torch import nn
from vllm.config import VllmConfig

from duet_vlm.serve.served_method import ServedMethod
from duet_vlm_vllm.stages.decoder import stage_decoder
from duet_vlm_vllm.stages.running_step import RunningStep


class StagedModel:
    """In front of a model's class.

    Attributes
    ----------
    running : RunningStep or None
        What the runner tells a step to; None for a first stage alone.
    """

    duet: ServedMethod
    language_model: nn.Module
    running: RunningStep | None = None

    def begin_stages(self, vllm_config: VllmConfig) -> None:
        """Let the decoder drop rows as the settings say; at the end of the model's own ``__init__``."""
        self.running = stage_decoder(self.language_model.model, self.duet, vllm_config)

    def get_model_state_cls(self) -> type:
        """Asked by vLLM's second model runner."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from duet_vlm_vllm.stages.model_state import StagedModelState

        return DefaultModelState if self.running is None else StagedModelState
