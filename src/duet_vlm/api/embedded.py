"""Models and tasks that ship inside installed packages, found by entry points; no package is imported before one of its
names is used.

A package offers an :class:`EmbeddedModel` in the group ``duet_vlm.embedded_models`` and an :class:`EmbeddedTask` in
``duet_vlm.tasks``. The core offers ``tiny`` in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

MODELS, TASKS = "duet_vlm.embedded_models", "duet_vlm.tasks"


@dataclass(frozen=True)
class EmbeddedModel:
    """A small model with its weights inside a package.

    Attributes
    ----------
    name : str
        Name for ``--model``.
    folder : pathlib.Path
        Config, weights and processor files, as ``save_pretrained`` writes them.
    read_processor : callable, optional
        Reads the processor from ``folder``; transformers' ``AutoProcessor`` unless given.
    """

    name: str
    folder: Path
    read_processor: Callable[[Path], Any] | None = None

    def processor(self) -> Any:
        """The processor, without network."""
        if self.read_processor is not None:
            return self.read_processor(self.folder)
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.folder, local_files_only=True)

    def load(self, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        """The trained model in evaluation mode and its processor, without network.

        Parameters
        ----------
        dtype : torch.dtype, optional
            float32 unless given; the files are in float16.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        precision = dtype or torch.float32
        model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=precision, local_files_only=True)
        return model.eval(), self.processor()


@dataclass(frozen=True)
class Sample:
    """One question about pictures or a clip.

    Attributes
    ----------
    question, answer, kind : str
    needed : numpy.ndarray, (visual tokens,) bool
        Tokens that the answer needs: picture by picture or frame by frame, row by row. All False where the answer is
        that something is absent.
    images, frames : tuple of PIL.Image.Image
        The pictures; the frames of the clip.
    """

    question: str
    answer: str
    kind: str
    needed: np.ndarray
    images: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The picture of a question about one."""
        (image,) = self.images
        return image


@dataclass(frozen=True)
class EmbeddedTask:
    """A stream of generated questions without end, and the embedded model that was trained to answer them.

    Attributes
    ----------
    name : str
        Name for ``--tasks``.
    model : EmbeddedModel
    kinds : tuple of str
        Kinds of question; samples take turns.
    draw : callable
        ``draw(split, seed, number, kind)``: the sample of scene ``number``, or None where that scene offers no such
        question.
    tries : int
        Scenes drawn for one sample at most.
    media : str
        What a prompt shows, as the model's placeholder: "<image>" or "<video>".
    """

    name: str
    model: EmbeddedModel
    kinds: tuple[str, ...]
    draw: Callable[[str, int, int, str], Sample | None]
    tries: int = 1
    media: str = "<image>"

    @property
    def clips(self) -> bool:
        """True where its questions show clips."""
        return self.media == "<video>"

    def path(self) -> Path:
        """Folder of the weights; works with ``from_pretrained``."""
        return self.model.folder

    def load(self, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        """The model in evaluation mode and its processor, without network; float32 unless ``dtype`` is given."""
        return self.model.load(dtype)

    def prompt(self, question: str, shown: int = 1) -> str:
        """The text that goes to the processor together with ``shown`` pictures or clips."""
        return "USER: " + f"{self.media}\n" * shown + f"{question} ASSISTANT:"

    def sample(self, split: str, index: int, seed: int = 0) -> Sample:
        """Sample number ``index`` of the stream (split, seed); the kinds of question take turns.

        Parameters
        ----------
        split : str
            "train", "validation" or "test": disjoint by construction, the split is part of the random seed.
        index, seed : int
        """
        if index < 0:
            raise ValueError(f"index must be 0 or more, got {index}")
        kind = self.kinds[index % len(self.kinds)]
        for number in range(index * self.tries, (index + 1) * self.tries):
            if (sample := self.draw(split, seed, number, kind)) is not None:
                return sample
        raise RuntimeError(
            f"none of {self.tries} scenes offers a {kind} question (split {split!r}, seed {seed}, index {index})"
        )

    def samples(self, split: str, n: int, seed: int = 0) -> list[Sample]:
        """The first ``n`` samples of a stream."""
        if n < 0:
            raise ValueError(f"n must be 0 or more, got {n}")
        return [self.sample(split, index, seed) for index in range(n)]


def model_names() -> list[str]:
    """Names of the embedded models of all installed packages; "tiny" comes first."""
    return list(_entries(MODELS))


def task_names() -> list[str]:
    """Names of the embedded tasks of all installed packages; "tiny" comes first."""
    return list(_entries(TASKS))


def embedded_model(name: str) -> EmbeddedModel:
    """An embedded model by its name, which is one of ``model_names()``."""
    model: EmbeddedModel = _entries(MODELS)[name].load()
    return model


def embedded_task(name: str) -> EmbeddedTask:
    """An embedded task by its name, which is one of ``task_names()``."""
    task: EmbeddedTask = _entries(TASKS)[name].load()
    return task


def _entries(group: str) -> dict[str, EntryPoint]:
    entries: Sequence[EntryPoint] = sorted(
        entry_points(group=group), key=lambda entry: (entry.name != "tiny", entry.name)
    )
    return {entry.name: entry for entry in entries}
