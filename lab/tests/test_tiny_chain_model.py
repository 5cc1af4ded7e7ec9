"""The shipped model ``tiny-chain``: loads by name and without network, reads one picture and two, and answers."""

from pathlib import Path

import pytest
import torch

import duet_vlm
from duet_vlm.api.loading import load
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.run_sample import answer
from duet_vlm.evaluation.tasks import right, task, usual_model
from duet_vlm_lab.generators.chain_questions import KINDS
from duet_vlm_lab.generators.chain_scenes import CELLS
from duet_vlm_lab.recipe.chain_lessons import LESSONS
from duet_vlm_lab.tasks import chain


@pytest.fixture(scope="module")
def loaded():
    return load(usual_model("tiny-chain"))


def test_weights_are_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in chain.path().iterdir()}
    assert sum(files.values()) < 15e6
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training_log.json"} <= set(
        files
    )


def test_its_tower_is_that_of_the_tiny_model(loaded) -> None:
    ours, theirs = loaded.model.model.vision_tower.state_dict(), tiny.load()[0].model.vision_tower.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_answers_fresh_questions(loaded) -> None:
    """Five of each kind, of a stream that nothing else asks: most are right, and the rest is no habit of one word."""
    questions = [task("tiny-chain").ask(77, index) for index in range(5 * len(KINDS))]
    (outcome,) = answer(loaded, [ExperimentCell("none")], questions, 4).values()
    assert sum(right(q, said) for q, said in zip(questions, outcome.answers, strict=True)) >= 0.75 * len(questions)


@pytest.mark.slow
def test_without_pictures_in_the_decoder_it_guesses(loaded) -> None:
    """Questions cannot be answered from their words."""
    questions = [task("tiny-chain").ask(78, index) for index in range(4 * len(KINDS))]
    full, blind = answer(
        loaded, [ExperimentCell("none"), ExperimentCell("duet", settings={"schedule": ((1, 0.0),)})], questions, 4
    ).values()
    hits = [sum(right(q, said) for q, said in zip(questions, one.answers, strict=True)) for one in (full, blind)]
    assert hits[1] < 0.55 * hits[0]


def test_two_pictures_in_one_prompt_are_reduced_each(loaded) -> None:
    question = task("tiny-chain").ask(77, KINDS.index("pair_count"))
    with duet_vlm.attach(loaded.model, "duet_plus", budget=0.11) as handle, torch.no_grad():
        loaded.model.generate(**loaded.inputs(question.images, question.text), max_new_tokens=2)
        assert [span.span.tokens for span in handle.trace[0]] == [
            256,
            256,
        ] and handle.report().measured_mean < 2 * 0.12 * 256


def test_lessons_are_no_part_of_the_task() -> None:
    asked = {task("tiny-chain").ask(79, index).kind for index in range(3 * len(KINDS))}
    assert asked == set(KINDS) and not asked & set(LESSONS)
    texts = " ".join(task("tiny-chain").ask(79, index).text for index in range(3 * len(KINDS))).lower().split()
    assert not {cell.lower() for cell in CELLS} & set(texts)


def test_it_is_found_by_name_and_by_folder(loaded) -> None:
    other = load(str(Path(chain.path())))
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), other.model.parameters(), strict=True))
