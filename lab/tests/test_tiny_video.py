"""The tiny video model: its processor, its recipe, and the shipped weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import duet_vlm
from duet_vlm.api.embedded import Sample
from duet_vlm.api.loading import LoadedModel
from duet_vlm.api.loading import load as load_by_name
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.run_sample import answer
from duet_vlm.evaluation.tasks import task
from duet_vlm.evaluation.tiny.network import DECODER_LAYERS
from duet_vlm_lab.generators.clips import CLIP_ROWS, ROWS
from duet_vlm_lab.generators.clips_questions import CHANCE, KINDS, ORDERLESS
from duet_vlm_lab.methods.whole_frames import WholeFrames
from duet_vlm_lab.networks.video_network import VIDEO, VIDEO_TOKEN, build_video_model, start_from_pictures
from duet_vlm_lab.networks.video_processor import TinyVideoProcessor, build_video_processor
from duet_vlm_lab.recipe.reading import answer_logits, decode
from duet_vlm_lab.recipe.video import BATCH, VideoStage, lessons, visual_rows
from duet_vlm_lab.recipe.video_packing import all_rows, choose_rows, pack_clips
from duet_vlm_lab.tasks import video


@pytest.fixture(scope="module")
def loaded():
    return video.load()


def said(loaded, items: list[Sample]) -> list[str]:
    model, processor = loaded
    text = [video.prompt(item.question) for item in items]
    inputs = processor(videos=[item.frames for item in items], text=text, padding=True, padding_side="left")
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]


# ---- processor


def test_every_word_has_its_number():
    tokenizer = build_video_processor().tokenizer
    assert {word: tokenizer.convert_tokens_to_ids(word) for word in VIDEO_TOKEN} == VIDEO_TOKEN and len(
        tokenizer
    ) == len(VIDEO_TOKEN)
    words = tokenizer.convert_ids_to_tokens(
        tokenizer(video.prompt("Does the STAR appear before the moon?"))["input_ids"]
    )
    assert words == ["<s>", "USER:", VIDEO, "does", "the", "star", "appear", "before", "the", "moon", "?", "ASSISTANT:"]


def test_a_clip_may_be_given_in_several_ways():
    processor, item = build_video_processor(), video.sample("test", 0)
    text = video.prompt(item.question)
    ways = [
        item.frames,
        [item.frames],
        [np.asarray(f) for f in item.frames],
        np.stack(item.frames),
        np.stack(item.frames)[None],
    ]
    made = [processor(text=text, videos=way) for way in ways]
    assert made[0]["pixel_values_videos"].shape == (1, 8, 3, 112, 112)
    assert (made[0]["input_ids"] == VIDEO_TOKEN[VIDEO]).sum() == CLIP_ROWS == 520
    for other in made[1:]:
        assert all(torch.equal(value, other[name]) for name, value in made[0].items())


def test_frames_of_other_sizes_become_112():
    frames = [Image.new("RGB", (320, 240), (frame, 0, 0)) for frame in range(4)]
    made = build_video_processor()(text=video.prompt("What is the first word?"), videos=frames)
    assert (
        made["pixel_values_videos"].shape == (1, 4, 3, 112, 112)
        and (made["input_ids"] == VIDEO_TOKEN[VIDEO]).sum() == 4 * ROWS
    )


def test_processor_is_saved_and_read_back(tmp_path):
    processor, item = build_video_processor(), video.sample("test", 1)
    processor.save_pretrained(tmp_path)
    again = TinyVideoProcessor.from_pretrained(tmp_path)
    content = [{"type": "video"}, {"type": "text", "text": item.question}]
    for one in (processor, again):
        assert one.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        ) == video.prompt(item.question)
    a, b = (one(text=video.prompt(item.question), videos=item.frames) for one in (processor, again))
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("text", "lengths", "words"),
    [
        ("what ?", [8], "the text has 0 <video>, but 1 clips"),
        ("<video> <video> what ?", [8], "the text has 2 <video>, but 1 clips"),
        ("<video> <video> what ?", [8, 4], r"clips of \[4, 8\] frames"),
        ("<video> what ?", [0], r"clips of \[0\] frames"),
    ],
)
def test_mistakes_are_explained(text, lengths, words):
    clips = [[Image.new("RGB", (112, 112))] * n for n in lengths]
    with pytest.raises(ValueError, match=words):
        build_video_processor()(text=text, videos=clips)
    with pytest.raises(ValueError, match="trained on clips only"):
        build_video_processor()(text=text, images=clips[0][:1] or [Image.new("RGB", (112, 112))])
    with pytest.raises(ValueError, match="only 'pt' is made"):
        build_video_processor()(text=text, return_tensors="np")


# ---- recipe


def test_start_is_the_picture_model():
    model, (pictures, _) = start_from_pictures().model, tiny.load()
    table = pictures.model.vision_tower.embeddings.position_embedding.weight
    for tower in (model.video_tower, model.image_tower):
        mine = tower.embeddings.position_embedding.weight
        assert torch.equal(mine[0], table[0])
        assert all(torch.equal(mine[1 + 8 * r + c], table[1 + 16 * r + c]) for r in range(8) for c in range(8))
        mine, theirs = tower.encoder.state_dict(), pictures.model.vision_tower.encoder.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    theirs = pictures.model.language_model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.language_model.state_dict().items())


def test_packed_questions_equal_single_ones():
    model, items = build_video_model().eval(), lessons("train", 0, 0, 1)
    model.set_attn_implementation("eager")
    packed = pack_clips(items, all_rows(1), np.random.default_rng(0))
    processor = build_video_processor()
    with torch.no_grad():
        last, _ = decode(
            model.model.language_model, visual_rows(model.model, items), packed, DECODER_LAYERS, DECODER_LAYERS
        )
        together = answer_logits(model.model.language_model, last, packed.answer_rows)[0]
        for n in (0, 3, len(items[0].questions) - 1):
            frames = video.sample("train", 0).frames  # the same clip
            inputs = processor(text=video.prompt(items[0].questions[n].text), videos=frames)
            torch.testing.assert_close(together[n], model(**inputs).logits[0, -1], atol=1e-4, rtol=1e-3)


def test_shortened_clips_keep_the_middle_of_everything():
    rng = np.random.default_rng(0)
    for item in lessons("train", 1, 0, 20):
        rows = choose_rows(item, 96, rng)
        assert len(rows) == 96 and (np.diff(rows) > 0).all() and set(np.flatnonzero(item.centers)) <= set(rows)


def test_late_mask_hides_only_visual_rows_from_text():
    packed = pack_clips(lessons("train", 0, 0, 2), all_rows(2), np.random.default_rng(0), late=True)
    hidden = packed.mask != packed.late_mask
    assert (
        hidden.any()
        and not hidden[:, :, : 2 + CLIP_ROWS].any()
        and not hidden[..., 2 + CLIP_ROWS :].any()
        and not hidden[..., :2].any()
    )


def test_a_step_trains_projector_decoder_and_probes_only():
    stage = VideoStage(0, 10, False)
    first = stage.batch(3)
    assert first["packed"].patches.equal(stage.batch(3)["packed"].patches) and len(first["items"]) == BATCH
    out = stage(**first)
    out["loss"].backward()
    learning = {
        name.split(".")[1] for name, p in stage.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert learning == {"language_model", "multi_modal_projector", "time", "gaps"} and torch.isfinite(out["loss"])
    grouped = {id(p) for opt in stage.optimizers() for group in opt.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in stage.parameters() if p.requires_grad}


# ---- shipped weights


def test_weights_are_small_and_complete():
    files = {f.name: f.stat().st_size for f in video.path().iterdir()}
    assert sum(files.values()) < 15e6
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "training_log.json",
    } <= set(files)


def test_auto_class_loads_without_network(monkeypatch):
    from transformers import AutoModelForImageTextToText

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForImageTextToText.from_pretrained(video.path())
    assert (
        type(model).__name__ == "VideoLlavaForConditionalGeneration"
        and model.config.video_token_id == VIDEO_TOKEN[VIDEO]
    )


def test_tower_is_the_picture_tower(loaded):
    theirs = tiny.load()[0].model.vision_tower.encoder.state_dict()
    assert all(
        torch.equal(value, theirs[name]) for name, value in loaded[0].model.video_tower.encoder.state_dict().items()
    )


def test_shipped_model_answers(loaded):
    """Every kind clearly above what guessing gives, and above what a reader reaches who does not know the order of the
    frames."""
    items = video.samples("test", 40, seed=9)
    right = {kind: [] for kind in KINDS}
    for item, text in zip(items, said(loaded, items), strict=True):
        right[item.kind].append(text == item.answer)
    share = {kind: np.mean(hits) for kind, hits in right.items()}
    assert np.mean(list(share.values())) >= 0.9
    assert all(share[kind] > CHANCE[kind] + 0.3 for kind in KINDS), share
    assert all(share[kind] > ORDERLESS[kind] + 0.3 for kind in KINDS if kind != "count"), share


def test_backwards_it_answers_the_opposite(loaded):
    items = [item for item in video.samples("test", 20, seed=8) if item.kind == "motion"]
    turned = [replace(item, frames=item.frames[::-1]) for item in items]
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert (
        sum(opposite[item.answer] == text for item, text in zip(items, said(loaded, turned), strict=True))
        >= len(items) - 1
    )


def test_batch_equals_single(loaded):
    items = video.samples("test", 5, seed=7)
    assert said(loaded, items) == [said(loaded, [item])[0] for item in items]


def test_model_is_found_by_name(loaded):
    found = load_by_name("tiny-video")
    theirs = loaded[0].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in found.model.state_dict().items())
    assert isinstance(found.processor, TinyVideoProcessor) and found.model.dtype == torch.float32


# ---- in the evaluation


def ran(loaded, questions, *runs: ExperimentCell):
    return answer(LoadedModel("tiny-video", *loaded), runs, questions, 4)


def test_whole_frames_leave_as_if_they_had_been_masked(loaded):
    """Every second frame kept, positions kept: the same logits as hiding the other frames from all attention."""
    model, processor = loaded
    item = video.sample("test", 3)
    inputs = processor(videos=item.frames, text=video.prompt(item.question))
    frame = (torch.arange(CLIP_ROWS) // ROWS)[None]
    visual = inputs["input_ids"] == VIDEO_TOKEN[VIDEO]
    mask = inputs["attention_mask"].clone()
    mask[visual] = (frame % 2 == 1).long().flatten()  # of each pair of frames the middle falls on the second
    with torch.no_grad():
        places = torch.arange(mask.shape[1])[None]
        hidden = model(**{**inputs, "attention_mask": mask}, position_ids=places).logits[0, -1]
        with duet_vlm.attach(model, WholeFrames()) as handle:
            found = model(**inputs).logits[0, -1]
            assert handle.report().measured_mean == CLIP_ROWS / 2
    torch.testing.assert_close(found, hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 9}, "frames=9 of=8"),
        ({"options": {"crops": "per_crop"}}, "use crops='joint'"),
        ({"of": 7}, "not made of 7 equal frames"),
        ({"budget": 0.5}, "no budget"),
    ],
)
def test_whole_frames_explain_what_they_need(loaded, settings, words):
    with pytest.raises(ValueError, match=words), duet_vlm.attach(loaded[0], WholeFrames(), **settings) as handle:
        handle.plan(CLIP_ROWS)


def test_questions_know_what_they_need(loaded):
    """The oracle keeps every needed row at a budget where chance keeps few of them."""
    questions = [task("tiny-video").ask(0, i) for i in range(10)]
    oracle, chance = ran(
        loaded,
        questions,
        ExperimentCell("oracle", 0.07, {"options": {"crops": "joint"}}),
        ExperimentCell("random", 0.07),
    ).values()
    assert oracle.recalls[1] == oracle.recalls[0] and chance.recalls[1] < 0.3 * chance.recalls[0]
