"""vLLM plug-in of duet-vlm: the first stage of its methods, out of tree.

vLLM calls ``register`` in each of its processes. No model is imported there: vLLM does so by name, where it needs one.
"""

from __future__ import annotations

import warnings

TESTED = ((0, 32),)  # vLLM's minor versions
MODULES = {
    "LlavaForConditionalGeneration": "llava:DuetLlava",
    "LlavaNextForConditionalGeneration": "llava_next:DuetLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:DuetLlavaOnevision",
    "InternVLForConditionalGeneration": "internvl:DuetInternVL",
    "Qwen2VLForConditionalGeneration": "qwen2_vl:DuetQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:DuetQwen25VL",
    "Qwen3VLForConditionalGeneration": "qwen3_vl:DuetQwen3VL",
}


def register() -> None:
    """Add the models to vLLM's registry under names of their own; harmless if called again."""
    import vllm
    from vllm import ModelRegistry

    from duet_vlm.serve.served_method import PREFIX

    check_version(vllm.__version__)
    known = set(ModelRegistry.get_supported_archs())
    for architecture, place in MODULES.items():
        if PREFIX + architecture not in known:
            ModelRegistry.register_model(PREFIX + architecture, f"{__name__}.{place}")


def check_version(version: str) -> None:
    """Warn of a vLLM that nobody has tried: its inner seams may have moved."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers not in TESTED:
        tested = ", ".join(".".join(map(str, one)) for one in TESTED)
        warnings.warn(
            f"duet-vlm-vllm is tested with vLLM {tested}, and this is {version}: check answers before you rely on it",
            stacklevel=3,
        )
