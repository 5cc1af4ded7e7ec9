"""The recipe of ``tiny-chain``: packing equals one question at a time, exact resume, and nothing but answers to learn
from."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_tiny_training import resumed_is_whole

from duet_vlm.api.loading import load
from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.run_sample import answer
from duet_vlm.evaluation.tasks import task
from duet_vlm.evaluation.tiny.questions import split_words
from duet_vlm_lab.generators.chain_questions import KINDS, PAIRS, SINGLE, question
from duet_vlm_lab.generators.chain_scenes import grid_scene
from duet_vlm_lab.networks.chain_network import CHAIN_TOKEN, DISTINCT, LAYERS, TURNS, build_decoder
from duet_vlm_lab.recipe.chain import PARTS, ChainStage, CurriculumPart, answers_seen, draw_kinds, part_at
from duet_vlm_lab.recipe.chain_packing import PREFIX, decode, pack
from duet_vlm_lab.tasks import chain
from duet_vlm_lab.train_chain import STEPS, main

pytestmark = pytest.mark.train


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Two pictures a step, a step for each part of the curriculum, and pairs in every second step with whole pictures."""
    for name, value in {
        "ANSWERS": 16,
        "PAIRS_SHOWN": 2,
        "PAIR_QUESTIONS": 3,
        "PAIR_EVERY": 2,
        "FIT_STEPS": 2,
        "FIT_PICTURES": 2,
        "CHUNK": 1,
    }.items():
        patch.setattr(f"duet_vlm_lab.recipe.chain.{name}", value)
    patch.setattr(ChainStage, "validate", lambda self: {"all": 0.0})
    parts = (
        CurriculumPart(min(p.until, i + 1) if i + 1 < len(PARTS) else p.until, p.side, 2, p.keep, p.kinds)
        for i, p in enumerate(PARTS)
    )
    patch.setattr("duet_vlm_lab.recipe.chain.PARTS", tuple(parts))


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of one command after one step."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        main(["--out", str(folder), "--steps", "1", "--pictures", "6", "--fp32"])
    return folder / "weights"


def test_packed_questions_equal_single_ones_through_the_stock_layers():
    decoder, scene = build_decoder(0).eval(), grid_scene("validation", 0, 0)
    asked = [question(scene, kind, scene.generator(2)) for kind in SINGLE]
    asked = [q for q in asked if q]
    patches = np.sort(np.random.default_rng(0).permutation(256)[:40])[None]
    visual = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(0))
    packed = pack([asked], patches, 256)
    with torch.no_grad():
        together = decode(decoder, visual, packed)[0, packed.answer_rows[0]]
        for row, q in zip(together, asked, strict=True):
            words = [CHAIN_TOKEN[w] for w in (*split_words(q.text), "ASSISTANT:")]
            start, text = (
                decoder.embed_tokens(torch.tensor([ids])) for ids in ([CHAIN_TOKEN["<s>"], CHAIN_TOKEN["USER:"]], words)
            )
            places = torch.cat(
                [torch.arange(PREFIX), torch.from_numpy(patches[0]) + PREFIX, torch.arange(len(words)) + PREFIX + 256]
            )
            alone = decoder(
                inputs_embeds=torch.cat([start, visual, text], 1), position_ids=places[None]
            ).last_hidden_state[0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_resume_gives_the_same_weights(tmp_path, small):
    """Through every part of the curriculum, pairs of whole pictures among them."""

    def build() -> ChainStage:
        return ChainStage(0, 16, False, 6)

    start, after = resumed_is_whole(build, tmp_path, 6)
    assert not any(torch.equal(start[k], after[k]) for k in start if k.endswith("_proj.weight"))


def test_every_layer_starts_alike():
    """No layer is stronger than another at the start, and in each queries equal keys: attention begins as content
    matching, everywhere."""
    decoder = build_decoder(3)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        norms = torch.stack([layer.get_submodule(part).weight.detach().norm() for layer in decoder.layers])
        assert len(norms) == DISTINCT and norms.max() / norms.min() < 1.02, part
    for layer in decoder.layers:
        query, key = layer.self_attn.q_proj.weight.detach(), layer.self_attn.k_proj.weight.detach()
        assert (query * key).sum() > 0.8 * query.norm() * key.norm()  # but for the noise


def test_only_projector_and_decoder_learn_from_tokens_and_answers_alone(small):
    stage = ChainStage(0, 20, False, 6)
    assert {name.split(".")[0] for name, _ in stage.named_parameters()} == {"projector", "decoder"}
    moved = {id(p) for part in stage.optimizers() for group in part.param_groups for p in group["params"]}
    assert moved == {id(p) for p in stage.parameters()}
    batch = stage.batch(0)
    assert set(vars(batch["packed"])) == {"ids", "positions", "mask", "answer_rows", "answers"}
    assert batch["packed"].mask.dtype == torch.bool


def test_answers_are_counted_as_they_are_asked(small):
    stage = ChainStage(0, 20, False, 6)
    asked = [sum(len(q) for q in stage.batch(step)["asked"]) for step in range(9)]
    assert [answers_seen(step) for step in range(10)] == np.cumsum([0, *asked]).tolist() and len(set(asked)) == 2


def test_lessons_get_longer_and_most_of_what_is_read_are_whole_pictures():
    assert [part_at(step) for step in (0, PARTS[0].until, STEPS)] == [PARTS[0], PARTS[1], PARTS[-1]]
    assert PARTS[-1].keep == (256,) and PARTS[-1].side == 4
    rows = {
        whole: sum(p.pictures * np.mean(p.keep) for p in map(part_at, range(STEPS)) if (p.keep == (256,)) == whole)
        for whole in (True, False)
    }
    assert rows[True] > 2 * rows[False]  # visual tokens
    first = [
        next(i for i, part in enumerate(PARTS) if kind in part.kinds)
        for kind in ("attribute", "hop1", "any2", "any3", "hop3")
    ]
    assert first == sorted(set(first))
    kinds = draw_kinds({"hop1": 3.0, "count": 1.0}, 24, np.random.default_rng(0))
    assert len(kinds) == 24 and 16 <= kinds.count("hop1") <= 20


@pytest.mark.slow
def test_one_command_trains_and_exports_a_model_that_answers(trained):
    loaded = load(str(trained))
    assert (trained / "model.safetensors").stat().st_size < 15e6 and "curve" in (
        trained / "training_log.json"
    ).read_text()
    questions = [task("tiny-chain").ask(0, KINDS.index(kind)) for kind in ("read_word", "hop2", *PAIRS)]
    found = answer(
        loaded, [ExperimentCell("none"), ExperimentCell("oracle", 0.22), ExperimentCell("random", 0.22)], questions, 1
    )
    assert [len(outcome.answers) for outcome in found.values()] == [4] * 3
    oracle, chance = found["oracle@0.22"].recalls, found["random@0.22"].recalls
    assert oracle[0] == oracle[1] > 2 * chance[1] > 0


@pytest.mark.parametrize("kind", ["hop2", PAIRS[0]])
def test_the_stock_model_reads_prompts_as_training_packs_them(kind, trained):
    loaded, item = load(str(trained)), chain.sample("validation", KINDS.index(kind))
    model = loaded.model.model
    inputs = loaded.processor(
        images=list(item.images), text=chain.prompt(item.question, len(item.images)), return_tensors="pt"
    )
    assert loaded.inputs(item.images, item.question)["input_ids"].equal(inputs["input_ids"])
    with torch.no_grad():
        stock = loaded.model(**inputs).logits[0, -1]
        seen = model.get_image_features(inputs["pixel_values"])
        visual = torch.cat(list(getattr(seen, "pooler_output", seen)))[None]
        packed = pack([[item_of(item)]], np.arange(visual.shape[1])[None], visual.shape[1])
        ours = (
            decode(model.language_model, visual, packed)[0, packed.answer_rows[0, 0]]
            @ model.language_model.embed_tokens.weight.T
        )
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)


def test_the_exported_decoder_is_the_trained_layers_in_turns(trained):
    decoder = load(str(trained)).model.model.language_model
    assert len(decoder.layers) == LAYERS == DISTINCT * TURNS
    for number, layer in enumerate(decoder.layers):
        for name, weight in layer.named_parameters():
            assert weight.equal(decoder.layers[number % DISTINCT].get_parameter(name)), (number, name)
    packed = pack([[item_of(chain.sample("validation", KINDS.index("hop2")))]], np.arange(256)[None], 256)
    visual = torch.randn(1, 256, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = decode(decoder, visual, packed)
        del decoder.layers[DISTINCT:]
        assert decode(decoder, visual, packed, TURNS).equal(whole)


def item_of(item):
    """A sample as packing reads it."""
    return type("Asked", (), {"text": item.question, "answer": item.answer, "kind": item.kind})


def load_acceptance():
    spec = importlib.util.spec_from_file_location(
        "chain_acceptance", Path(__file__).parents[1] / "studies/chain_acceptance.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_acceptance_asks_for_a_picture_that_is_needed_late():
    acceptance = load_acceptance()

    def row(every: float, **kinds: float) -> dict:
        return {"accuracy": every, "kinds": {kind: {"accuracy": kinds.get(kind, every)} for kind in KINDS}}

    runs = {run.label: row(0.9) for run in acceptance.experiment("x", 8, 0).runs()}
    assert len(runs) == 1 + LAYERS - 1 + 3  # the full model, a run for each layer but the first, the references
    judged = acceptance.judge(runs)
    assert [c["holds"] for c in judged.values()] == [True, True, False, False, False, True, False]
    late = {
        "none from layer 3": row(0.8, hop2=0.79, count=0.5),
        "none from layer 4": row(0.85, hop3=0.7),
        acceptance.RANDOM: row(0.6),
    }
    assert all(c["holds"] for c in acceptance.judge(runs | late).values())
    assert not all(c["holds"] for c in acceptance.judge(runs | late | {"full model": row(0.9, hop3=0.7)}).values())
