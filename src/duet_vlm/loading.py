"""Models and images by name, with clear errors. Nothing is fetched unless the user names a hub id."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # larger pictures are refused before they are decoded
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Loaded:
    """A model with its processor."""

    name: str
    model: Any
    processor: Any

    def inputs(self, images: Sequence[Image.Image], prompt: str) -> Any:
        """What the model wants, on its device and in its precision."""
        text = chat_text(self.processor, prompt, len(images))
        return self.processor(images=list(images), text=text, return_tensors="pt").to(self.model.device, self.model.dtype)


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


def source(name: str) -> tuple[str, bool]:
    """Where a model comes from: (folder or hub id, whether it is local).

    Raises
    ------
    ValueError
        If it is neither 'tiny', nor a folder with a config, nor something that reads as a hub id.
    """
    if name == "tiny":
        from duet_vlm import tiny

        return str(tiny.path()), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {name}: this folder has no config.json, so it is no saved model")
        return str(folder), True
    if folder.exists() or not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"--model {name}: no such folder; give 'tiny', a folder saved by save_pretrained, or a hub id (owner/name)")
    return name, False


def config_of(name: str) -> Any:
    """The model's config, checked for a supported family before anything large is read."""
    from transformers import AutoConfig

    from duet_vlm.models.adapter import families

    place, local = source(name)
    with quiet(), _explained(name, local):
        config = AutoConfig.from_pretrained(place, local_files_only=local)
    known = families()
    if not any(config.model_type in cls.model_types for cls in known.values()):
        raise ValueError(f"--model {name}: family {config.model_type!r} is not supported; supported: {', '.join(known)}")
    return config


def load(name: str, device: str | None = None) -> Loaded:
    """A model in evaluation mode with its processor; weights from safetensors files only.

    In the checkpoint's own precision, except that float16 becomes float32 on a CPU.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = config_of(name)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place, local = source(name)
    with quiet(), _explained(name, local):
        halves_on_cpu = where == "cpu" and config.dtype == torch.float16  # dozens of times slower there than float32
        dtype = torch.float32 if name == "tiny" or halves_on_cpu else "auto"
        model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype, local_files_only=local, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(place, local_files_only=local)
        return Loaded(name, model.eval().to(where), processor)


@contextlib.contextmanager
def _explained(name: str, local: bool) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        how = "cannot be loaded from this folder" if local else "cannot be loaded; a hub id needs a network connection or a cached copy"
        raise ValueError(f"--model {name}: {how}: {reason}") from error


def chat_text(processor: Any, prompt: str, images: int) -> str:
    """The prompt as the model was taught to read it, with room for ``images`` pictures in front of the text."""
    if not getattr(processor, "chat_template", None):
        raise ValueError("this model's processor has no chat template, so a prompt cannot be built from --prompt alone")
    content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def open_image(path: Path) -> Image.Image:
    """An RGB picture, refused with the reason if it is missing, broken or huge.

    Raises
    ------
    ValueError
        With the path and what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(f"--image {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(path, f"{image.width} x {image.height} pixels")
                return image.convert("RGB")
    except Image.DecompressionBombError:
        raise _too_large(path, "a decompression bomb, says its header") from None
    except UnidentifiedImageError:
        raise ValueError(f"--image {path}: not an image that can be read") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"--image {path}: the file is damaged or cannot be read ({' '.join(str(error).split())})") from None


def _too_large(path: Path, what: str) -> ValueError:
    return ValueError(f"--image {path}: {what}; at most {MAX_PIXELS / 1e6:.0f} million pixels are read. Make it smaller first")
