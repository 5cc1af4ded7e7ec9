"""Models by name, with clear errors. Nothing is fetched unless the user names a hub id."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from PIL import Image

from duet_vlm.api.embedded import embedded_model, model_names
from duet_vlm.inputs.images import rgb
from duet_vlm.inputs.video import FRAMES, VideoFrames
from duet_vlm.reducers.persistence import KEY, load_from_config
from duet_vlm.utils import lab
from duet_vlm.utils.suggest import did_you_mean

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SECONDS = 5.0  # in which a hub has to answer
ADAPTER = "adapter_config.json"  # what makes a folder one of PEFT adapters


@dataclass(frozen=True)
class LoadedModel:
    """A model with its processor."""

    name: str
    model: Any
    processor: Any

    @property
    def frames(self) -> int:
        """Frames of a clip that this model wants, where the user does not say."""
        return getattr(getattr(self.processor, "video_processor", self.processor), "num_frames", None) or FRAMES

    @property
    def takes_clips(self) -> bool:
        from duet_vlm.models.lookup import adapter_for

        return hasattr(self.processor, "video_processor") or any(
            stream.name == "video" for stream in adapter_for(self.model).modalities
        )

    def inputs(self, images: Sequence[Image.Image], prompt: str, clips: Sequence[VideoFrames] = ()) -> Any:
        """The model's inputs, on its device and in its precision; pictures and then clips go in front of the prompt.

        Raises
        ------
        ValueError
            Clips for a model that takes none, or no chat template.
        """
        text = chat_text(self.processor, prompt, len(images), len(clips))
        given: dict[str, Any] = {"images": [rgb(image) for image in images]} if images or not clips else {}
        if clips:
            given |= self._clips(clips)
        return self.processor(text=text, return_tensors="pt", **given).to(self.model.device, self.model.dtype)

    def _clips(self, clips: Sequence[VideoFrames]) -> dict[str, Any]:
        """The processor's arguments: frames that are chosen already, and where in the clip they stand."""
        if not self.takes_clips:
            family = self.model.config.model_type
            raise ValueError(
                f"--video: {self.name} ({family}) takes pictures only; 'duet-vlm models' says who takes clips"
            )
        stock = hasattr(self.processor, "video_processor")
        videos = [list(clip.frames) for clip in clips]
        if not stock:
            return {"videos": videos}
        places = [
            {
                "total_num_frames": clip.total,
                "fps": clip.rate,
                "duration": clip.total / clip.rate,
                "frames_indices": list(clip.indices),
            }
            for clip in clips
        ]
        return {"videos": videos, "video_metadata": places, "do_sample_frames": False}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes off the terminal while loading; put its settings back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def device_for(device: str | None = None) -> str:
    """The device of a model: ``device``, which has to be there; without one "cuda" where there is one, else "cpu".

    Raises
    ------
    ValueError
        No such device on this machine; the message says which there are.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = ["cpu"] + (
        [] if accelerator is None else [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    )
    try:
        wanted = torch.device(device)
    except RuntimeError:  # no kind of device
        wanted = None
    if wanted is not None and (wanted.type == "cpu" or f"{wanted.type}:{wanted.index or 0}" in there):
        return device
    without = wanted is not None and wanted.type == "cuda" and torch.version.cuda is None and torch.version.hip is None
    why = f" (torch {torch.__version__} is built without CUDA)" if without else ""
    raise ValueError(f"--device {device}: not on this machine{why}; there is {', '.join(there)}")


def source(name: str) -> tuple[str, bool]:
    """The source of a model: (folder or hub id, whether it is local).

    Raises
    ------
    ValueError
        If it is no embedded model, nor a folder with a config, nor something that reads as a hub id.
    """
    embedded = model_names()
    if name in embedded:
        return str(embedded_model(name).folder), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER)):
            raise ValueError(f"--model {name}: this folder has no config.json, so it is no saved model")
        return str(folder), True
    if name in lab.MODELS and not folder.exists():
        raise ValueError(lab.how_to_install("--model", name))
    if folder.exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        what = (
            "a file, no folder" if folder.exists() else f"no such folder{did_you_mean(name, {*embedded, *lab.MODELS})}"
        )
        raise ValueError(
            f"--model {name}: {what}; give {', '.join(map(repr, embedded))}, a folder of save_pretrained, or a hub id (owner/name)"
        )
    return name, False


def check_model(name: str) -> dict[str, Any] | None:
    """The config of a local model as it is written, read without transformers; None of a hub id, and of adapters
    without one.

    Raises
    ------
    ValueError
        As ``source``; a config that is no JSON object or of a family without adapter, and a hub id that cannot be
        fetched.
    """
    path, local = source(name)
    file = Path(path) / "config.json"
    if not local:
        _check_hub(name)
    if not local or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {name}: cannot be loaded from this folder: {file.name}: {' '.join(str(error).split())}"
        ) from error
    from duet_vlm.api.catalogue import rows
    from duet_vlm.models.unsupported import refusal

    known = {row["family"]: row["model_types"] for row in rows("models")}
    if not any(config.get("model_type") in types for types in known.values()):
        raise ValueError(f"--model {refusal(name, config.get('model_type'), list(known))}")
    return config


def depth_of(config: dict[str, Any] | None) -> int | None:
    """Decoder layers that a config names; None where it leaves them to transformers."""
    text = (config or {}).get("text_config", config) or {}
    depth = text.get("num_hidden_layers") if isinstance(text, dict) else None
    return depth if isinstance(depth, int) else None


def _check_hub(name: str) -> None:
    """Refuse a hub id that is neither on this machine nor to be had: the hub's own client asks five times, half a
    minute, and tells of each.

    Behind a proxy, and where somebody has said that there is no network, that is left to the client.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    address = urlsplit(constants.ENDPOINT)
    kept = any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", ADAPTER))
    if kept or constants.HF_HUB_OFFLINE or address.hostname is None or getproxies():
        return
    try:
        socket.create_connection(
            (address.hostname, address.port or (80 if address.scheme == "http" else 443)), timeout=HUB_SECONDS
        ).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(
            f"--model {name}: is not on this machine, and {address.hostname} cannot be reached ({why}); a hub id needs a network connection or a "
            "cached copy"
        ) from error


def base_of(name: str) -> str | None:
    """The model under a folder of PEFT adapters, as the folder names it; None for whole models."""
    path, local = source(name)
    file = Path(path) / ADAPTER
    return json.loads(file.read_text())["base_model_name_or_path"] if local and file.is_file() else None


def config_of(name: str) -> Any:
    """The model's config, checked for a supported family before anything large is read."""
    from transformers import AutoConfig

    from duet_vlm.models.lookup import families
    from duet_vlm.models.unsupported import refusal

    path, local = _with(name, "config.json")
    with quiet(), _explained(name, local):
        config = AutoConfig.from_pretrained(path, local_files_only=local)
    known = families()
    if not any(config.model_type in cls.model_types for cls in known.values()):
        raise ValueError(f"--model {refusal(name, config.model_type, list(known))}")
    return config


def load(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> LoadedModel:
    """A model in evaluation mode with its processor; weights from safetensors files only.

    In ``dtype``, or the checkpoint's own precision, except that float16 becomes float32 on a CPU. A folder of PEFT
    adapters is loaded with the model under it, into which the adapters are merged; that model must be on this machine.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    where = device_for(device)
    config = config_of(name)
    (path, local), base = source(name), base_of(name)
    with quiet(), _explained(name, local):
        precision = dtype or (torch.float32 if name in model_names() else "auto")
        model = AutoModelForImageTextToText.from_pretrained(
            base or path, dtype=precision, local_files_only=local, use_safetensors=True
        )
        if dtype is None and where == "cpu" and model.dtype == torch.float16:
            model = model.float()  # float16 is dozens of times slower there
        if base is not None:
            model = _merged(model, Path(path), config)
        readable, local = _with(name, "tokenizer_config.json")
        return LoadedModel(name, model.eval().to(where), _processor(name, readable, local))


def _processor(name: str, path: str, local: bool) -> Any:
    if name in model_names():
        return embedded_model(name).processor()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path, local_files_only=local)


def _with(name: str, file: str) -> tuple[str, bool]:
    """The place that a model's ``file`` is read from: its own place, or, for adapters saved without it, the model under
    them."""
    (path, local), base = source(name), base_of(name)
    return (path, local) if base is None or (Path(path) / file).is_file() else (base, True)


def _merged(model: Any, adapters: Path, config: Any) -> Any:
    from peft import PeftModel

    if not (adapters / "adapter_model.safetensors").is_file():
        raise ValueError("adapters are read from adapter_model.safetensors only, which is missing")
    model = PeftModel.from_pretrained(model, adapters).merge_and_unload()
    if hasattr(config, KEY):  # the reduction they were trained with
        setattr(model.config, KEY, load_from_config(adapters))  # with weights of a method's own where the adapters are
    return model


@contextlib.contextmanager
def _explained(name: str, local: bool) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ImportError) and "torchvision" in reason.lower():
            raise ValueError(
                f'--model {name}: its processor needs torchvision: pip install ".[video]" in your clone of duet-vlm'
            ) from error
        how = (
            "cannot be loaded from this folder"
            if local
            else "cannot be loaded; a hub id needs a network connection or a cached copy"
        )
        raise ValueError(f"--model {name}: {how}: {reason}") from error


def chat_text(processor: Any, prompt: str, images: int, clips: int = 0) -> str:
    """The prompt as the model was taught to read it, with room for ``images`` pictures and ``clips`` clips in front of
    the text."""
    if not getattr(processor, "chat_template", None):
        raise ValueError("this model's processor has no chat template, so a prompt cannot be built from --prompt alone")
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if token and token in prompt:
            raise ValueError(
                f"--prompt holds {token!r}, which stands for a picture or clip: leave it out, they go in front by themselves"
            )
    content = [{"type": "image"}] * images + [{"type": "video"}] * clips + [{"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
