"""The lab as a plug-in: what the core finds of it, and its crowded pictures."""

from __future__ import annotations

import pytest

import duet_vlm
from duet_vlm.api.embedded import embedded_model, embedded_task, model_names, task_names
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.tiny.questions import KINDS
from duet_vlm.train.data import conversations
from duet_vlm.utils import lab
from duet_vlm_lab import models, tasks
from duet_vlm_lab.tasks import crowded


def test_the_core_finds_what_it_names() -> None:
    assert model_names() == ["tiny", *sorted(lab.MODELS)] and task_names() == ["tiny", *sorted(lab.TASKS)]
    assert all(embedded_model(name) is getattr(models, name.removeprefix("tiny-")) for name in lab.MODELS)
    assert all(embedded_task(name) is getattr(tasks, name.removeprefix("tiny-")) for name in lab.TASKS)
    assert all(embedded_task(name).name == name and embedded_task(name).path().is_dir() for name in task_names())
    assert all(duet_vlm.get_method(name).__module__.startswith("duet_vlm_lab.") for name in lab.METHODS)


def test_references_are_no_methods() -> None:
    assert lab.METHODS[1:] == ("oracle", "whole_frames") and not set(lab.METHODS[1:]) & set(duet_vlm.list_methods())


def test_crowded_samples():
    items = crowded.samples("test", 14)
    assert [i.kind for i in items] == [*KINDS, *KINDS]
    again = crowded.sample("test", 9)
    assert (again.question, again.answer, again.image.tobytes()) == (
        items[9].question,
        items[9].answer,
        items[9].image.tobytes(),
    )
    assert again.image.tobytes() != tiny.sample("test", 9).image.tobytes()
    assert all(i.needed.shape == (256,) and (i.needed.any() or i.answer in ("no", "0")) for i in items)


def test_conversations_of_other_tasks() -> None:
    held_out = conversations(["tiny-crowded"], limit=1, split="validation")[0]
    assert held_out.images[0].tobytes() == crowded.sample("validation", 0).image.tobytes()
    pair = next(i for i in range(40) if len(tasks.chain.sample("train", i).images) == 2)
    told = conversations(["tiny-chain"], limit=pair + 1)[pair]
    assert [part["type"] for part in told.messages[0]["content"]] == ["image", "image", "text"] and len(
        told.images
    ) == 2
    with pytest.raises(ValueError, match="tiny-video shows clips, and conversations hold images only"):
        conversations(["tiny-video"], limit=1)
