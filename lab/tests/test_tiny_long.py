"""Long clips: drawn as described, answered by what is brief in them, and read by the shipped model of that name."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from duet_vlm.api.embedded import EmbeddedModel
from duet_vlm.api.loading import load as load_by_name
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.tasks import task, usual_model
from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.questions import PLURALS, split_words
from duet_vlm.evaluation.tiny.scenes import SHAPES
from duet_vlm_lab import train_long
from duet_vlm_lab.generators.long_clips import BRIEF, LENGTHS, ROWS, SCENES, SIDE, LongClip, center, long_clip, render
from duet_vlm_lab.generators.long_questions import CHANCE, KINDS, name, question
from duet_vlm_lab.models import read_video_processor
from duet_vlm_lab.networks.long_network import LONG_TOKEN, LONG_WORDS, POSITIONS, build_long_model, start_from_clips
from duet_vlm_lab.networks.video_network import VIDEO, VIDEO_TOKEN
from duet_vlm_lab.networks.video_processor import TinyVideoProcessor, build_video_processor
from duet_vlm_lab.recipe.chain_packing import decode
from duet_vlm_lab.recipe.long import BACK_HEAD, BACK_LAYERS, LongStage, before, chosen, everything, numbers
from duet_vlm_lab.tasks import TURN, long

PINNED = "b33966afadc6dc51b26af38cc7e46c44204b28a95da813cd5033bf44e4db0760"


# ---- data


def test_clips_of_every_length_are_pinned():
    digest = hashlib.sha256()
    for index in (*range(10), *(TURN * turn for turn in range(1, 4))):
        item = long.sample("test", index)
        for frame in item.frames:
            digest.update(frame.tobytes())
        digest.update(f"{item.question}|{item.answer}|{item.kind}".encode())
        digest.update(np.packbits(item.needed).tobytes())
    assert digest.hexdigest() == PINNED


def test_kinds_take_turns_and_lengths_after_every_forty():
    found = [long.sample("validation", i) for i in (0, 1, 4, 5, 39, 40, 80, 120)]
    assert [item.kind for item in found] == [KINDS[i] for i in (0, 1, 4, 0, 4, 0, 0, 0)]
    assert [len(item.frames) for item in found] == [64] * 5 + [128, 256, 64]
    assert all(
        item.needed.shape == (len(item.frames) * ROWS,) and item.frames[0].size == (SIDE, SIDE) for item in found
    )


def drawn(frames: int, n: int, seed: int = 5) -> list[LongClip]:
    return [long_clip("test", seed, i, frames) for i in range(n)]


@pytest.mark.parametrize("frames", LENGTHS)
def test_one_thing_shows_at_a_time_and_none_in_two_scenes(frames):
    for clip in drawn(frames, 60):
        shown = [range(event.first, event.first + event.frames) for event in clip.events]
        assert shown[0].start >= 0 and shown[-1].stop <= frames
        assert all(a.stop < b.start for a, b in zip(shown, shown[1:], strict=False))  # background between any two
        assert all(span.start // (frames // SCENES) == (span.stop - 1) // (frames // SCENES) for span in shown)
        assert all(
            len(span) == BRIEF for span, event in zip(shown, clip.events, strict=True) if event.actor.role != "guest"
        )
        names = [name(event) for event in clip.events if event.actor.role != "flash"]
        assert (
            len(set(names)) == len(names)
            and len({name(clip.events[i]) for i in clip.played("flash")} - set(names)) == 1
        )


@pytest.mark.parametrize("frames", [60, 66, 0])
def test_no_clip_is_too_short_or_uneven(frames):
    with pytest.raises(ValueError, match=f"frames={frames}: a long clip has a multiple of 4 frames, at least 64"):
        long_clip("test", 0, 0, frames)


def answer_from_description(text: str, clip: LongClip) -> str:
    """The answer, by reading the list of events with other means than the generator's."""
    line = sorted((event.first, name(event), event.actor.role) for event in clip.events)
    shown = [what for _, what, _ in line]
    if m := re.fullmatch(r"What is right (before|after) the (\w+)\?", text):
        return shown[shown.index(m[2]) + (1 if m[1] == "after" else -1)]
    if m := re.fullmatch(r"In what scene does the (\w+) appear\?", text):
        return str(1 + line[shown.index(m[1])][0] // (clip.frames // 4))
    if m := re.fullmatch(r"Does the (\w+) appear (before|after) the (\w+)\?", text):
        sooner, later = (m[1], m[3]) if m[2] == "before" else (m[3], m[1])
        return "yes" if shown.index(sooner) < shown.index(later) else "no"
    if m := re.fullmatch(r"What is the (first|last) word\?", text):
        return [what for what in shown if what in WORDS][0 if m[1] == "first" else -1]
    m = re.fullmatch(r"How many (\w+) appear\?", text)
    return str(shown.count(SHAPES[PLURALS.index(m[1])]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", LENGTHS)
def test_answers_follow_from_the_description(kind, frames):
    for clip in drawn(frames, 60):
        asked = question(clip, kind, clip.generator(2))
        assert answer_from_description(asked.text, clip) == asked.answer
        assert {*split_words(asked.text), asked.answer} <= set(LONG_TOKEN)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_needed_is_the_middle_of_what_is_asked_about(kind):
    """Without the events that the needed rows show, the answer is another one or there is none; events of other rows do
    not matter."""
    for clip in drawn(128, 60):
        asked = question(clip, kind, clip.generator(2))
        needed = [i for i, event in enumerate(clip.events) if asked.needed[center(event, event.first)]]
        assert (
            asked.needed.sum()
            == len(needed)
            == (int(asked.answer) if kind == "count" else 2 if kind in ("beside", "order") else 1)
        )
        if needed:
            alone = dataclasses.replace(clip, events=tuple(clip.events[i] for i in needed))
            assert answer_from_description(asked.text, alone) == asked.answer


def test_answers_cannot_be_guessed():
    clips = drawn(64, 800, seed=0)
    for kind in KINDS:
        answers = [question(clip, kind, clip.generator(2)).answer for clip in clips]
        assert max(answers.count(a) for a in set(answers)) / len(answers) < CHANCE[kind] + 0.06, kind


def test_rows_that_are_needed_show_something():
    """Drawn with and without its events, a clip differs most where they are, and only there but for noise."""
    for clip in drawn(64, 8):
        bare = render(dataclasses.replace(clip, events=())).astype(int)
        differs = np.abs(render(clip).astype(int) - bare).reshape(64, 2, 14, 2, 14, 3).mean((2, 4, 5)).reshape(64, 4)
        for event in clip.events:
            frame, patch = divmod(center(event, event.first), ROWS)
            assert frame == event.first and differs[frame, patch - 1] > 10
        shown = {frame for event in clip.events for frame in range(event.first, event.first + event.frames)}
        # the noise is another one after an event
        assert max(differs[frame].max() for frame in set(range(64)) - shown) < 8


def test_unknown_kinds_and_indices_are_refused():
    with pytest.raises(ValueError, match="unknown question kind 'motion'; use one of beside, when"):
        question(long_clip("test", 0, 0, 64), "motion", np.random.default_rng(0))
    with pytest.raises(ValueError, match="index must be 0 or more, got -1"):
        long.sample("test", -1)
    with pytest.raises(ValueError, match="n must be 0 or more, got -1"):
        long.samples("test", -1)


# ---- words and start


def test_words_come_after_those_of_the_video_model():
    tokenizer = build_video_processor(SIDE, LONG_WORDS).tokenizer
    assert {word: tokenizer.convert_tokens_to_ids(word) for word in LONG_TOKEN} == LONG_TOKEN and len(tokenizer) == len(
        LONG_TOKEN
    )
    assert list(LONG_TOKEN)[: len(VIDEO_TOKEN)] == list(VIDEO_TOKEN)
    words = tokenizer.convert_ids_to_tokens(tokenizer(long.prompt("In what SCENE does the star appear?"))["input_ids"])
    assert words == ["<s>", "USER:", VIDEO, "in", "what", "scene", "does", "the", "star", "appear", "?", "ASSISTANT:"]


def test_start_is_the_video_model():
    from duet_vlm_lab.tasks import video

    model, clips = start_from_clips().model, video.load()[0].model
    table = clips.video_tower.embeddings.position_embedding.weight
    for tower in (model.video_tower, model.image_tower):
        assert torch.equal(tower.embeddings.position_embedding.weight, table[[0, 1, 2, 9, 10]])
    for part in ("language_model", "multi_modal_projector"):
        theirs = getattr(clips, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(model, part).state_dict().items())


# ---- recipe


def test_packed_questions_equal_single_ones():
    stage = LongStage(0, 10, False).eval()
    made = stage.packed([clip := long_clip("train", 0, 0, 64)], everything([clip]))
    model, processor = build_long_model().eval(), build_video_processor(SIDE, LONG_WORDS)
    model.model.load_state_dict(stage.core.state_dict())
    with torch.no_grad():
        visual = stage.core.multi_modal_projector(stage.seen(clip, made["rows"][0]))[None]
        last = decode(stage.core.language_model, visual, made["packed"])
        together = last[0, made["packed"].answer_rows[0]] @ stage.core.language_model.embed_tokens.weight.T
        for n in (0, 8, -1):
            inputs = processor(text=long.prompt(made["asked"][0][n].text), videos=render(clip))
            torch.testing.assert_close(together[n], model(**inputs).logits[0, -1], atol=1e-3, rtol=1e-3)


def test_shortened_clips_keep_a_row_of_everything():
    rng = np.random.default_rng(0)
    for clip in drawn(192, 20):
        rows = chosen(clip, 24, rng)
        assert len(rows) == 24 and (np.diff(rows) > 0).all()
        for event in clip.events:
            assert set(range(event.first * ROWS, (event.first + event.frames) * ROWS)) & set(rows)


def test_a_step_trains_projector_decoder_and_read_out():
    stage = LongStage(0, 40, False)
    first = stage.batch(3)
    assert np.array_equal(first["rows"], stage.batch(3)["rows"])
    out = stage(**first)
    out["loss"].backward()
    learning = {
        ".".join(key.split(".")[:2])
        for key, p in stage.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert learning == {"core.language_model", "core.multi_modal_projector", "memory.0", "memory.1"} and torch.isfinite(
        out["loss"]
    )
    grouped = {id(p) for opt in stage.optimizers() for group in opt.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in stage.parameters() if p.requires_grad}


def test_rows_know_what_showed_before_them():
    clip = drawn(64, 1)[0]
    number = numbers(clip, np.arange(64 * ROWS))
    told = before(clip, number)
    names = {token: word for word, token in LONG_TOKEN.items()}
    for i, event in enumerate(clip.events):
        rows = slice(event.first * ROWS, (event.first + event.frames) * ROWS)
        assert (number[rows] == i + 1).all() and {names[t] for t in told[rows]} == {
            name(clip.events[i - 1]) if i else "<pad>"
        }
    assert (told[number == 0] == -100).all() and (number > 0).sum() == ROWS * sum(event.frames for event in clip.events)


def test_looking_back_is_measured_on_the_attention_of_the_stock_layers():
    stage, clip = LongStage(0, 10, False).eval(), drawn(64, 1)[0]
    rows = chosen(clip, 48, np.random.default_rng(0))[None]
    made, decoder = stage.packed([clip], rows), stage.core.language_model
    stage.core.set_attn_implementation("eager")
    with torch.no_grad():
        stage.answers(**{key: made[key] for key in ("clips", "asked", "rows", "packed")})
        found = stage.back_loss(made["packed"], torch.from_numpy(made["numbered"]))
        visual = stage.core.multi_modal_projector(stage.seen(clip, rows[0]))[None]
        start = decoder.embed_tokens(torch.tensor([[LONG_TOKEN["<s>"], LONG_TOKEN["USER:"]]]))
        places = made["packed"].positions[:, : 2 + rows.shape[1]]
        weights = decoder(
            inputs_embeds=torch.cat([start, visual], 1), position_ids=places, output_attentions=True
        ).attentions
    event, layers = [0, None, *made["numbered"][0].tolist()], []
    for layer in BACK_LAYERS:
        missed = []
        for row in range(2, len(event)):
            earlier = [other for other in range(row) if event[other] == event[row] - 1 and (other == 0 or event[other])]
            if event[row] and earlier:
                missed.append(-weights[layer][0, BACK_HEAD, row, earlier].sum().log())
        layers.append(torch.stack(missed).mean())
    torch.testing.assert_close(found, torch.stack(layers).mean(), atol=1e-4, rtol=1e-4)


def test_whole_clips_come_later_and_grow():
    stage = LongStage(0, 400, False)

    def whole(steps) -> list[int]:
        """Frames of the clips that are shown with all their rows."""
        made = map(stage.batch, steps)
        return [b["clips"][0].frames for b in made if b["rows"].shape[1] == b["clips"][0].frames * ROWS]

    assert not whole(range(0, 100, 10)) and set(whole(range(150, 180))) == {64} and max(whole(range(360, 390))) > 64


# ---- shipped weights


@pytest.fixture(scope="module")
def loaded():
    return long.load()


def said(loaded, items) -> list[str]:
    model, processor = loaded
    inputs = processor(
        videos=[item.frames for item in items],
        text=[long.prompt(item.question) for item in items],
        padding=True,
        padding_side="left",
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]


def test_weights_are_small_and_read_the_longest_clip(loaded):
    assert sum(f.stat().st_size for f in long.path().iterdir()) < 10e6
    assert loaded[0].config.text_config.max_position_embeddings == POSITIONS > LENGTHS[-1] * ROWS + 40
    theirs = tiny.load()[0].model.vision_tower.encoder.state_dict()
    assert all(
        torch.equal(value, theirs[key]) for key, value in loaded[0].model.video_tower.encoder.state_dict().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 2 * TURN])
def test_shipped_model_answers(loaded, first):
    """Short and long clips; seed 9 was never looked at when the model was made."""
    items = [long.sample("test", first + i, seed=9) for i in range(18)]
    right = {kind: [] for kind in KINDS}
    for item, text in zip(items, said(loaded, items), strict=True):
        right[item.kind].append(text == item.answer)
    share = {kind: np.mean(hits) for kind, hits in right.items()}
    assert np.mean(list(share.values())) >= 0.75, share
    assert all(share[kind] > CHANCE[kind] + 0.2 for kind in KINDS), share


def test_model_and_task_are_found_by_name(loaded):
    found = load_by_name("tiny-long")
    theirs = loaded[0].state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in found.model.state_dict().items())
    assert (
        isinstance(found.processor, TinyVideoProcessor)
        and found.frames == 64
        and load_by_name("tiny-video").frames == 8
    )
    asked = task("tiny-long")
    assert asked.clips and usual_model("tiny-long") == "tiny-long" and usual_model("tiny-crowded") == "tiny"
    item = long.sample("test", 41, seed=3)
    one = asked.ask(3, 41)
    assert (one.id, one.text, one.answers, one.kind) == ("3/41", item.question, (item.answer,), item.kind) and len(
        one.videos[0]
    ) == 128


@pytest.mark.slow
def test_one_command_trains_and_exports_a_model_that_answers(tmp_path):
    train_long.main(["--out", str(tmp_path), "--steps", "1", "--fp32"])
    model, processor = EmbeddedModel("trained", tmp_path / "weights", read_video_processor).load()
    trained = load_file(next((tmp_path / "long").glob("checkpoint-*/model.safetensors")))
    for key, weight in model.model.state_dict().items():
        torch.testing.assert_close(weight, trained[f"core.{key}"], rtol=1e-3, atol=1e-6)  # float16 in the file
    start = long.load()[0].model.language_model.layers[0].mlp.up_proj.weight
    assert not torch.equal(model.model.language_model.layers[0].mlp.up_proj.weight, start)
    item = long.sample("validation", 0)
    inputs = processor(videos=[item.frames], text=long.prompt(item.question), return_tensors="pt")
    assert model.generate(**inputs).shape[1] > inputs["input_ids"].shape[1]
    assert json.loads((tmp_path / "weights" / "training_log.json").read_text())["settings"]["steps"] == 1
