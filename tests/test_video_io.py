"""Reading clips: which frames are taken, that they are the right ones, and what is said about files that cannot be
read."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from families import build
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.cli.main import app
from duet_vlm.inputs import video
from duet_vlm.inputs.video import decode, frame_numbers, length, pieces, sampled, upright
from duet_vlm.runtime.encode.video_chunks import ChunkConfig
from duet_vlm.viz import film, on_film, overlay
from duet_vlm.viz.overlay import Panel, cell_box
from duet_vlm_lab.tasks import video as tiny_video

WIDE, HIGH = 64, 48
CODECS = {
    "clip.mp4": "libx264",
    "clip.mkv": "libx264",
    "clip.webm": "libvpx-vp9",
    "clip.avi": "mpeg4",
    "clip.ts": "libx264",
}
Picture = Callable[[int], np.ndarray]


def grey(number: int) -> np.ndarray:
    """A frame that says its number by its brightness: 6 steps of 256 per frame."""
    return np.full((HIGH, WIDE, 3), 6 * number % 256, np.uint8)


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (HIGH, WIDE, 3), np.uint8)


def number_of(picture: Image.Image) -> int:
    return round(float(np.asarray(picture).mean()) / 6)


def write(
    path: Path,
    count: int = 40,
    picture: Picture = grey,
    codec: str = "libx264",
    rate: int = 10,
    turn: int = 0,
    **options: str,
) -> Path:
    """A small clip made with PyAV."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = picture(0).shape[:2]
        stream.pix_fmt = "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode())
    return path


# ---- which frames


@given(st.integers(1, 5000), st.integers(1, 200))
def test_frames_are_evenly_spaced(total: int, count: int) -> None:
    indices = sampled(total, count)
    assert (
        indices == tuple(int(Fraction(i * total, count)) for i in range(count))
        if count <= total
        else indices == tuple(range(total))
    )


@pytest.mark.parametrize(("total", "count"), [(300, 8), (40, 8), (7, 7), (1000, 16), (9, 4)])
def test_frames_are_those_that_stock_processors_take(total: int, count: int) -> None:
    assert (
        list(sampled(total, count))
        == default_sample_indices_fn(VideoMetadata(total, fps=10.0), num_frames=count).tolist()
    )


@pytest.mark.parametrize("name", CODECS)
def test_decoded_frames_are_the_ones_asked_for(name: str, tmp_path: Path) -> None:
    """B-frames, containers with and without an index, with and without a stated length."""
    clip = decode(write(tmp_path / name, codec=CODECS[name]), 8)
    assert (clip.indices, clip.total, clip.rate) == ((0, 5, 10, 15, 20, 25, 30, 35), 40, 10.0)
    assert [number_of(frame) for frame in clip.frames] == list(clip.indices)
    assert all(frame.mode == "RGB" and frame.size == (WIDE, HIGH) for frame in clip.frames)


def test_an_event_is_seen_from_its_frame_on(tmp_path: Path) -> None:
    """A red square appears at frame 17 and is gone at 28."""

    def scene(number: int) -> np.ndarray:
        picture = np.full((HIGH, WIDE, 3), 200, np.uint8)
        if 17 <= number < 28:
            picture[8:24, 8:24] = (255, 0, 0)
        return picture

    clip = decode(write(tmp_path / "event.mp4", picture=scene), 10)
    red = [frame.getpixel((16, 16))[1] < 60 for frame in clip.frames]  # type: ignore[index]
    assert clip.indices == (0, 4, 8, 12, 16, 20, 24, 28, 32, 36)
    assert red == [17 <= index < 28 for index in clip.indices] and sum(red) == 2


def test_frames_per_second_and_short_clips(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", count=30)
    assert decode(path, fps=2).indices == (0, 5, 10, 15, 20, 25)
    assert decode(path, fps=0.01).indices == (0,) and decode(path, fps=10_000).indices == tuple(range(30))
    assert len(decode(path).frames) == 8
    assert decode(path, 50).indices == tuple(range(30))
    assert length(path) == (30, 10.0)


def test_no_more_is_decoded_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain, seen, pictures = write(tmp_path / "clip.mp4"), video._readable, [], []

    def counting(path: Path, items: Iterator[Any], total: int) -> Iterator[Any]:
        for item in plain(path, items, total):
            seen.append(type(item).__name__)
            yield item

    monkeypatch.setattr(video, "_readable", counting)
    monkeypatch.setattr(video, "upright", lambda picture, rotation: pictures.append(1) or picture)
    decode(path, 4)
    # up to the last one, 30; only the chosen ones become pictures
    assert seen.count("VideoFrame") == 31 and len(pictures) == 4


def test_turned_clips_stand_upright(tmp_path: Path) -> None:
    """Red in the upper right corner: turned counter-clockwise by 90 degrees it is in the upper left one."""

    def scene(number: int) -> np.ndarray:
        picture = np.zeros((HIGH, WIDE, 3), np.uint8)
        picture[:16, -16:] = (255, 0, 0)
        return picture

    path = write(tmp_path / "turned.mp4", count=3, picture=scene, turn=90)
    with av.open(str(path)) as container:
        turn = next(container.decode(video=0)).rotation
    assert turn == 90
    frame = decode(path, 1).frames[0]
    assert frame.size == (HIGH, WIDE) and frame.getpixel((4, 4))[0] > 150 and frame.getpixel((HIGH - 4, 4))[0] < 60  # type: ignore[index]
    flat = Image.fromarray(scene(0))
    assert upright(flat, 0) is flat and upright(flat, -90).getpixel((HIGH - 4, WIDE - 4)) == (255, 0, 0)
    assert upright(flat, 180).getpixel((4, HIGH - 4)) == (255, 0, 0)


def test_what_is_transparent_is_put_on_white(tmp_path: Path) -> None:
    """Red that cannot be seen on the left, red on the right."""
    drawn = np.zeros((HIGH, WIDE, 4), np.uint8)
    drawn[..., 0], drawn[:, WIDE // 2 :, 3] = 255, 255
    with av.open(str(tmp_path / "clear.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = HIGH, WIDE, "bgra"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn, format="rgba")))
        container.mux(stream.encode())
    (frame,) = decode(tmp_path / "clear.mkv").frames
    assert (
        frame.mode == "RGB"
        and frame.getpixel((2, 2)) == (255, 255, 255)
        and frame.getpixel((WIDE - 2, 2)) == (255, 0, 0)
    )


def test_numbers_of_16_bits_are_scaled(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "deep.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = HIGH, WIDE, "gray16le"
        container.mux(
            stream.encode(av.VideoFrame.from_ndarray(np.full((HIGH, WIDE), 257 * 90, np.uint16), format="gray16le"))
        )
        container.mux(stream.encode())
    (frame,) = decode(tmp_path / "deep.mkv").frames
    assert abs(np.asarray(frame).astype(int) - 90).max() <= 1


def test_addresses_are_not_opened() -> None:
    with pytest.raises(
        ValueError, match=r"^--video https://x\.org/clip\.mp4: a URL is not opened.*download the file and give its path"
    ):
        length(Path("https://x.org/clip.mp4"))


def test_frames_that_change_size_are_made_equal(tmp_path: Path) -> None:
    small = write(tmp_path / "a.ts", count=10)
    large = write(tmp_path / "b.ts", count=10, picture=lambda number: np.full((2 * HIGH, 2 * WIDE, 3), 120, np.uint8))
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    clip = decode(both, 4)
    assert {frame.size for frame in clip.frames} == {(WIDE, HIGH)} and number_of(clip.frames[-1]) == 20


# ---- files that cannot be read


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        decode(path, **options)
    assert str(caught.value).startswith(f"--video {path}: ") and all(word in str(caught.value) for word in words), (
        caught.value
    )


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4")
    refused(tmp_path / "none.mp4", "no such file")
    refused(tmp_path, "is a folder")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "words.txt").write_text("hello\n")
    (tmp_path / "words.mp4").write_text("hello\n")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    refused(tmp_path / "picture.png", "is a picture; give it to --image")
    for name in ("words.txt", "words.mp4", "empty.mp4", "noise.mp4"):
        refused(tmp_path / name, "not a video that can be read")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    refused(tmp_path / "sound.mp4", "no video stream")
    assert clip.is_file()


def test_files_that_name_other_files_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4")
    path = tmp_path / "list.ffconcat"
    path.write_text("ffconcat version 1.0\nfile clip.mp4\n")
    with av.open(str(path)) as container:  # FFmpeg itself would
        assert container.streams.video
    refused(path, "not a video that can be read")


def test_damage_names_what_can_be_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", count=120, picture=noise)
    whole.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) // 2])  # the index stands at the end of this file
    refused(whole, "or one that was cut off")
    early = write(tmp_path / "early.mp4", count=120, picture=noise, movflags="faststart")
    early.write_bytes(early.read_bytes()[: -len(early.read_bytes()) // 3])
    with pytest.raises(ValueError, match=r"damaged or cut off, (\d+) of 120 frames can be read") as caught:
        decode(early)
    assert 1 <= int(str(caught.value).split(" of 120")[0].split()[-1]) < 120
    avi = write(tmp_path / "cut.avi", count=120, codec="mpeg4", picture=noise)
    avi.write_bytes(avi.read_bytes()[: len(avi.read_bytes()) // 2])
    with pytest.raises(ValueError, match=r"damaged or cut off, \d+ of 120 frames can be read \(it ends early\)"):
        decode(avi)


def test_damage_in_the_middle(tmp_path: Path) -> None:
    """Every packet is there, but one in the middle holds nothing that decodes."""
    path = write(tmp_path / "clip.mp4", count=60, movflags="faststart", picture=noise)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for place, size in places[30:34]:
        data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    assert length(path)[0] == 60
    with pytest.raises(ValueError, match=r"damaged or cut off, \d+ of 60 frames can be read") as caught:
        decode(path, 60)
    assert int(str(caught.value).split(" of 60")[0].split()[-1]) <= 31


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_FRAME", WIDE * HIGH - 1)
        refused(path, f"frames of {WIDE} x {HIGH} pixels")
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_PIXELS", 4 * WIDE * HIGH)
        assert len(decode(path, 4).frames) == 4
        refused(path, "5 frames of", "take at most 4", frames=5)
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_LENGTH", 39)
        refused(path, "more than 39 frames")


def test_bad_numbers() -> None:
    for options, words in (
        ({"frames": 0}, "frames=0"),
        ({"frames": 2.5}, "frames=2.5"),
        ({"fps": 0.0}, "fps=0.0"),
        ({"frames": 4, "fps": 1}, "one"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(Path("any.mp4"), **options)  # type: ignore[arg-type]


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r'needs PyAV: pip install "\.\[video\]"'):
        decode(path)


# ---- the command line


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("verb", ["run", "viz"])
def test_what_the_command_line_refuses(verb: str, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4")
    assert "give --image, --video or both" in call(verb, "-p", "x", "-b", "64", code=2).stderr
    assert "no such file" in call(verb, "--video", tmp_path / "none.mp4", "-p", "x", "-b", "64", code=2).stderr
    assert (
        "--frames 4 and --fps 1.0"
        in call(verb, "--video", path, "-p", "x", "--frames", 4, "--fps", 1, "-b", "64", code=2).stderr
    )
    assert (
        f"{path}: not an image that can be read; clips are given to --video"
        in call(verb, "-i", path, "-p", "x", "-b", "64", code=2).stderr
    )
    assert "tiny (llava) takes pictures only" in call(verb, "--video", path, "-p", "x", "-b", "64", code=2).stderr
    assert "no such file" in json.loads(call(verb, "--video", "none.mp4", "-p", "x", "--json", code=2).stdout)["error"]


def test_a_question_about_a_file_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of the embedded task, written as a file and read again, shows the model what the frames themselves show."""
    sample = next(s for s in tiny_video.samples("test", 40) if s.kind == "read")
    path = write(
        tmp_path / "clip.mp4", count=32, picture=lambda number: np.asarray(sample.frames[number // 4]), crf="4"
    )
    shared = ["-m", "tiny-video", "--video", path, "-p", sample.question, "-b", "0.3"]
    got = json.loads(call("run", *shared, "--method", "frames+duet", "--compare", "--json").stdout)
    assert (got["answer"], got["full_answer"]) == (sample.answer, sample.answer)
    assert got["clips"] == [{"file": str(path), "frames": list(range(0, 32, 4)), "of": 32}]
    tokens = len(sample.needed)
    assert (
        got["report"]["method"] == "frames+duet" and 0.3 * tokens - 1 < got["report"]["measured_mean"] <= 0.3 * tokens
    )
    heads: list[str] = []
    monkeypatch.setattr(overlay, "Panel", lambda *given: [heads.append(given[0]), Panel(*given)][1])
    files = json.loads(call("viz", *shared, "--json", "-o", tmp_path / "out").stdout)["files"]
    assert heads[0] == "clip"
    drawn = Image.open(files[0])
    assert drawn.height > 8 * 150 and len(files) == 1


@pytest.mark.parametrize(("size", "options"), [(1, {"frames": 7}), (3, {"frames": 7}), (40, {"fps": 2.0}), (4, {})])
def test_pieces_are_the_clip(size: int, options: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4")
    whole, parts = decode(path, **options), list(pieces(path, size, **options))
    assert [i for part in parts for i in part.indices] == list(whole.indices)
    assert [number_of(frame) for part in parts for frame in part.frames] == [number_of(frame) for frame in whole.frames]
    assert all(len(part.frames) == len(part.indices) == size for part in parts[:-1])
    assert {(part.total, part.rate) for part in parts} == {(whole.total, whole.rate)}


def test_pieces_hold_no_more_than_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setattr(video, "MAX_PIXELS", 4 * WIDE * HIGH)
    assert sum(len(part.frames) for part in pieces(path, 4, fps=10)) == 40
    with pytest.raises(ValueError, match="40 frames of .* take at most 4 at a time"):
        decode(path, fps=10)
    with pytest.raises(ValueError, match="size=0: frames of a piece"):
        next(pieces(path, 0))


def test_a_long_clip_is_answered_in_pieces(tmp_path: Path) -> None:
    """Whatever the size of the pieces, the tokens that are held are those of evs on the whole clip, and the answer is
    that of the stream."""
    sample = next(s for s in tiny_video.samples("test", 40) if s.kind == "read")
    path = slow_clip(tmp_path / "clip.mp4", sample)
    shared = ["run", "-m", "tiny-video", "--video", path, "-p", sample.question, "--json"]
    found = [json.loads(call(*shared, "-b", 200, "--frames", 8, "--chunk-frames", size).stdout) for size in (1, 3, 8)]
    assert {got["answer"] for got in found} == {
        json.loads(call(*shared, "-b", 200, "--method", "evs", "--frames", 8).stdout)["answer"]
    }
    assert all((got["frames"], got["held"], got["visual_tokens"]) == (8, 200, 520) for got in found)
    text = call(*shared[:-1], "-b", 100, "--fps", 10, "--chunk-frames", 5).stdout
    assert "32 frames, 5 at a time: 100 of 2080 visual tokens held" in text


def test_a_terminal_sees_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4")
    words = [
        "run",
        "-m",
        "tiny-video",
        "--video",
        path,
        "-p",
        "x",
        "-b",
        100,
        "--fps",
        10,
        "--chunk-frames",
        16,
        "--json",
    ]
    assert call(*words).stderr == "" and frame_numbers(path, fps=10) == 40 and frame_numbers(path) == 8
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    shown = call(*words)
    assert (
        "40/40" in shown.stderr
        and "100 visual tokens held" in shown.stderr
        and json.loads(shown.stdout)["frames"] == 40
    )


def slow_clip(path: Path, sample: Any) -> Path:
    """Every frame of a sample four times."""
    return write(path, count=32, picture=lambda number: np.asarray(sample.frames[number // 4]), crf="4")


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Steps of the pieces of every call for clips that was cut."""
    found: list[list[int]] = []
    real = ChunkConfig.plan_chunks

    def cut(self: ChunkConfig, *given: Any) -> Any:
        made = real(self, *given)
        if made is not None:
            found.append([len(piece.steps) for piece in made.chunks])
        return made

    monkeypatch.setattr(ChunkConfig, "plan_chunks", cut)
    return found


def test_a_clip_goes_through_the_tower_in_pieces(tmp_path: Path, cuts: list[list[int]]) -> None:
    """With a method that is named: the same answer and the same report, whatever the pieces."""
    sample = tiny_video.sample("test", 0)
    path = slow_clip(tmp_path / "clip.mp4", sample)
    shared = [
        "run",
        "-m",
        "tiny-video",
        "--video",
        path,
        "-p",
        sample.question,
        "-b",
        "0.3",
        "--method",
        "duet",
        "--json",
    ]
    whole = json.loads(call(*shared).stdout)
    assert not cuts
    for size, more in ((3, []), (4, ["--compare"])):
        cuts.clear()
        made = json.loads(call(*shared, "--chunk-frames", size, *more).stdout)
        assert cuts == [[3, 3, 2] if size == 3 else [4, 4]] * (2 if more else 1)  # the full model is not cut
        assert (made["answer"], made["report"]) == (whole["answer"], whole["report"])


def test_frames_that_stand_still_are_not_encoded(tmp_path: Path, cuts: list[list[int]]) -> None:
    sample = tiny_video.sample("test", 0)
    path = slow_clip(tmp_path / "clip.mp4", sample)
    shared = ["run", "-m", "tiny-video", "--video", path, "-p", sample.question, "-b", "0.3", "--frames", 16, "--json"]
    whole, still = (json.loads(call(*shared, *more).stdout)["report"] for more in ([], ["--still-frames", 0.05]))
    (shown,) = cuts
    # each is taken twice, once before it was compressed
    assert sum(shown) == len({frame.tobytes() for frame in sample.frames}) <= 8
    assert (
        still["observed"]["vision_flops"] < 0.6 * whole["observed"]["vision_flops"] and still["full"] == whole["full"]
    )


def test_batches_of_clips_from_a_file(tmp_path: Path, cuts: list[list[int]]) -> None:
    """``generate`` and ``eval`` read lines with clips, in pieces if asked; a line may say how many frames are taken."""
    samples = [tiny_video.sample("test", index) for index in (0, 1)]
    lines = []
    for number, sample in enumerate(samples):
        slow_clip(tmp_path / f"{number}.mp4", sample)
        lines.append({"video": f"{number}.mp4", "question": sample.question, "answer": sample.answer})
    lines.append(lines[0] | {"video": ["0.mp4"], "frames": 16})
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = []
    for name, more in (("whole", []), ("pieces", ["--chunk-frames", 4])):
        call(
            "generate",
            "-m",
            "tiny-video",
            "--data",
            data,
            "-o",
            tmp_path / name,
            "-b",
            "0.5",
            "--batch",
            1,
            "--max-new-tokens",
            4,
            *more,
        )
        said.append((tmp_path / name).read_text())
        assert cuts == ([[4] * 2, [4] * 2, [4] * 4] if more else [])
    first, second = (json.loads(line)["answer"] for line in said[0].splitlines()[:2])
    assert said[0] == said[1] and (first, second) == tuple(sample.answer for sample in samples)
    words = ["eval", "--task", data, "-m", "tiny-video", "--methods", "duet", "-b", "0.5", "--batch", 1, "--workers", 1]
    words += ["--timing-rounds", 0, "--json"]
    runs = []
    for name, more in (("whole", []), ("pieces", ["--chunk-frames", 4])):
        cuts.clear()
        (made,) = json.loads(call(*words, "--name", name, "-o", tmp_path / "out", *more).stdout)["results"]
        # not the full model
        assert made["experiment"].get("chunk_frames") == (4 if more else None) and len(cuts) == (3 if more else 0)
        runs.append(made["runs"])
    assert runs[0] == runs[1]
    data.write_text(json.dumps(lines[0] | {"frames": 0}))
    assert (
        "line 1: frames 0: how many are taken of each video"
        in call("generate", "--data", data, "-b", "0.5", "-o", tmp_path / "x", code=2).stderr
    )
    data.write_text(json.dumps(lines[0] | {"video": "gone.mp4"}))
    assert "its video" in call("generate", "--data", data, "-b", "0.5", "-o", tmp_path / "x", code=2).stderr
    data.write_text(json.dumps(lines[0]))
    assert (
        "--data shows clips, and --model tiny takes pictures only"
        in call("generate", "--data", data, "-b", "0.5", "-o", tmp_path / "x", code=2).stderr
    )


def test_a_benchmark_of_clips_in_pieces(tmp_path: Path, cuts: list[list[int]]) -> None:
    words = [
        "bench",
        "-m",
        "tiny-video",
        "--frames",
        6,
        "--method",
        "duet",
        "-b",
        "0.5",
        "--rounds",
        1,
        "--new",
        2,
        "--json",
    ]
    made = json.loads(call(*words, "--chunk-frames", 2, "--still-frames", 0).stdout)
    assert (
        made["plan"]["chunk_frames"] == 2
        and made["plan"]["still_frames"] == 0.0
        and {tuple(steps) for steps in cuts} == {(2, 2, 2)}
    )
    assert [row["side"] for row in made["rows"]] == ["full", "duet at 50%"]


def test_pieces_of_what_is_no_clip(tmp_path: Path) -> None:
    """One sentence, before a model is loaded where that can be."""
    path, picture = write(tmp_path / "clip.mp4"), tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    shared = ["run", "-m", "tiny-video", "--video", path, "-p", "x", "-b", 64, "--method"]
    for words, text in (
        (
            ["run", "-i", picture, "-p", "x", "--chunk-frames", 4],
            "--chunk-frames 4: no clip is shown; give --video, or leave it out",
        ),
        (["run", "-i", picture, "-p", "x", "--still-frames", 0], "--still-frames 0.0: no clip is shown; give --video"),
        (
            ["bench", "--chunk-frames", 4, "--still-frames", 0.1],
            "--chunk-frames 4 and --still-frames 0.1: no clip is shown; give --frames",
        ),
        (
            ["eval", "--chunk-frames", 4, "-o", tmp_path / "o"],
            "no clip is shown; take tasks with clips in place of --tasks tiny",
        ),
        (["eval", "--experiment", path, "--still-frames", 0], "says what is asked: leave out --still-frames"),
        (
            ["generate", "--data", tmp_path, "-p", "x", "-b", 64, "-o", tmp_path / "o", "--chunk-frames", 4],
            'give --data with "video" in its lines',
        ),
        (
            ["run", "--video", path, "-p", "x", "--method", "duet", "-b", 64, "--chunk-frames", 4],
            "llava takes no clips, so frames",
        ),
        ([*shared, "zoo_prune", "--chunk-frames", 4], "calls the projector"),
        ([*shared, "duet", "--still-frames", "nan"], "Invalid value for '--still-frames'"),
        (
            [
                "eval",
                "--task",
                "tiny-video",
                "--methods",
                "rlt",
                "-b",
                "0.5",
                "--chunk-frames",
                4,
                "-o",
                tmp_path / "o",
            ],
            "rlt reduces in the tower",
        ),
    ):
        assert text in call(*words, code=2).stderr


def test_what_pieces_cannot_be_combined_with(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4")
    shared = ["run", "-m", "tiny-video", "--video", path, "-p", "x", "--chunk-frames", 4]
    for more, words in (
        ([], "say with --budget how many visual tokens are held"),
        (["-b", "0.5"], "say with --budget how many visual tokens are held"),
        (["-b", 64, "--positions", "keep"], "holds the tokens that evs keeps"),
        (["-b", 64, "--still-frames", 0], "is encoded frame by frame; leave it out"),
        (["-b", 64, "--compare"], "would need the whole clip at once"),
        (["-b", 64, "--video", path], "0 images and 2 clips; give one --video"),
    ):
        assert words in call(*shared, *more, code=2).stderr
    assert (
        "llava takes no clips" in call(*["tiny" if x == "tiny-video" else x for x in shared], "-b", 64, code=2).stderr
    )


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_stock_video_processors_name_what_they_need(tmp_path: Path) -> None:
    build("qwen2_vl").save_pretrained(tmp_path)
    parts = {
        f"{kind}_processor": {f"{kind}_processor_type": f"Qwen2VL{kind.title()}Processor"}
        for kind in ("image", "video")
    }
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor", **parts}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_video.path() / file, tmp_path)
    path = write(tmp_path / "clip.mp4")
    words = call("run", "-m", tmp_path, "--video", path, "-p", "x", "-b", "0.5", code=2).stderr
    assert 'its processor needs torchvision: pip install ".[video]"' in words


def test_the_film_of_a_clip() -> None:
    """Two frames of a CLS row and 2 x 2 patches: the CLS rows are counted first, patch p of frame f is cell 4 f + p."""
    trace = duet_vlm.SpanTrace(
        duet_vlm.Span(0, 0, 10), {6: (1, 9)}, (duet_vlm.StageTrace(0, (0, 3, 6), (2, 4, 5, 7, 8)),)
    )
    drawn = on_film(trace, 2)
    assert (drawn.span.grid, drawn.merged, drawn.stages[0].kept) == ((4, 2), {6: (2, 9)}, (0, 4, 6))
    assert drawn.stages[0].dropped == (1, 3, 5, 7, 8)
    boxes = [cell_box(drawn, token, 10) for token in (0, 1, 2, 6, 9)]
    assert boxes == [None, None, (0, 0, 10, 10), (0, 20, 10, 30), (10, 30, 20, 40)]
    # two steps of two frames each: the first frame of each
    strip = film([Image.new("RGB", (4, 2), (n, 0, 0)) for n in range(4)], 2)
    assert strip.size == (4, 4) and [strip.getpixel((0, y))[0] for y in range(4)] == [0, 0, 2, 2]  # type: ignore[index]
