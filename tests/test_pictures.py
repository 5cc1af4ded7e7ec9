"""Pictures of every mode, number type and file become upright RGB of eight bits; files that are none get one clear
error."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import duet_vlm
from duet_vlm import Span, SpanTrace, StageTrace
from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation import tasks, tiny
from duet_vlm.evaluation.lmms.arguments import parse_arguments
from duet_vlm.evaluation.lmms.engine import Engine
from duet_vlm.inputs.images import open_image, rgb
from duet_vlm.train.data import conversations
from duet_vlm.viz import draw, model_view
from duet_vlm_lab.tasks import video

ROOT = Path(duet_vlm.__file__).parent
# what every grey picture below should be
GREYS = np.array([[0, 51, 102, 153, 204, 255], [255, 153, 51, 204, 102, 0]], np.uint8)
SHARES = GREYS / 255  # of white


def in_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1).astype(np.uint8)


def grey(values: np.ndarray, mode: str | None = None) -> Image.Image:
    return Image.fromarray(values) if mode is None else Image.frombytes(mode, values.shape[::-1], values.tobytes())


def in_palette(transparent: int | None = None) -> Image.Image:
    """Greys by number; number 5 is white."""
    picture = Image.frombytes("P", GREYS.shape[::-1], (GREYS // 51).tobytes())
    picture.putpalette([shade for shade in range(0, 256, 51) for _ in "rgb"])
    if transparent is not None:
        picture.info["transparency"] = transparent
    return picture


def black_is_transparent(mode: str) -> Image.Image:
    """Grey, and what is black cannot be seen."""
    alpha = Image.fromarray(np.where(GREYS == 0, 0, 255).astype(np.uint8))
    return Image.merge(mode, [grey(GREYS)] * (len(mode) - 1) + [alpha])


GREY: dict[str, Any] = {
    "L": grey(GREYS),
    "RGB": grey(GREYS).convert("RGB"),
    "P": in_palette(),
    "CMYK": Image.merge("CMYK", [grey(255 - GREYS)] * 3 + [Image.new("L", GREYS.shape[::-1], 0)]),
    "I;16": grey((SHARES * 65535).astype("<u2"), "I;16"),
    "I;16B": grey((SHARES * 65535).astype(">u2"), "I;16B"),
    "I to 255": grey(GREYS.astype(np.int32)),
    "I to 65535": grey((SHARES * 65535).astype(np.int32)),
    "I to 2147483647": grey((SHARES * (2**31 - 1)).astype(np.int32)),
    "F to 1": grey(SHARES.astype(np.float32)),
    "F to 255": grey(GREYS.astype(np.float32)),
    "F to 65535": grey((SHARES * 65535).astype(np.float32)),
    "uint8": GREYS,
    "uint16": (SHARES * 65535).astype(np.uint16),
    "uint16, big end first": (SHARES * 65535).astype(">u2"),
    "uint32": (SHARES * (2**32 - 1)).astype(np.uint32),
    "int64 to 255": GREYS.astype(np.int64),
    "int16": np.rint(SHARES * (2**15 - 1)).astype(np.int16),
    "float64 to 1": SHARES,
    "float16 to 1": SHARES.astype(np.float16),
    "float32 to 255": GREYS.astype(np.float32),
    "float32, a little over": np.where(SHARES == 1, 1.05, np.where(SHARES == 0, -0.05, SHARES)),
    "tensor": torch.tensor(SHARES, dtype=torch.float32),
    "tensor [1, H, W]": torch.tensor(SHARES, dtype=torch.float32)[None],
    "[H, W, 3]": np.repeat(SHARES[..., None], 3, -1),
    "[4, H, W]": np.stack([GREYS] * 3 + [np.full_like(GREYS, 255)]),
}


@pytest.mark.parametrize("name", GREY)
def test_numbers_are_scaled_by_the_range_of_their_type(name: str) -> None:
    picture = rgb(GREY[name])
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), in_rgb(GREYS))


BOOLS: dict[str, Any] = {"1": grey(GREYS).point(lambda x: x > 100, mode="1"), "bool": GREYS > 100}


@pytest.mark.parametrize("name", BOOLS)
def test_two_shades_are_black_and_white(name: str) -> None:
    np.testing.assert_array_equal(np.asarray(rgb(BOOLS[name])), in_rgb(np.where(GREYS > 100, 255, 0)))


CLEAR: dict[str, Any] = {
    "LA": black_is_transparent("LA"),
    "RGBA": black_is_transparent("RGBA"),
    "RGBa": black_is_transparent("RGBA").convert("RGBa"),
    "P": in_palette(transparent=0),
    "P, half": in_palette(transparent=bytes([0, 255, 255, 255, 255, 255])),
    "PA": black_is_transparent("RGBA").convert("PA"),
    "[H, W, 2]": np.asarray(black_is_transparent("LA")),
    "[H, W, 4] to 1": np.asarray(black_is_transparent("RGBA")) / 255,
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_is_put_on_white(name: str) -> None:
    np.testing.assert_array_equal(np.asarray(rgb(CLEAR[name])), in_rgb(np.where(GREYS == 0, 255, GREYS)))


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    # 255 + (x - 255) * 0.2, rounded
    assert rgb(Image.new("RGBA", (1, 1), (255, 0, 51, 51))).getpixel((0, 0)) == (255, 204, 214)


@pytest.mark.parametrize(
    "values", [np.zeros((6, 5, 7)), np.zeros(4), np.zeros((0, 3)), np.zeros((2, 2, 2, 3))], ids=lambda v: str(v.shape)
)
def test_arrays_that_are_no_pictures(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"shape .* is no picture: give \[height, width\]"):
        rgb(values)


@pytest.mark.parametrize("number", [-1.0, np.nan, np.inf, 1e9])
def test_floats_outside_of_every_range(number: float) -> None:
    """-1: normalised already."""
    with pytest.raises(
        ValueError, match=r"in none of the ranges that are read \(0\.\.1, 0\.\.255, 0\.\.65535\): scale them first"
    ):
        rgb(np.array([[0.5, number]]))


def test_negative_integers() -> None:
    with pytest.raises(ValueError, match=r"pixels from -3 to 9 \(int32\).*0\.\.255, 0\.\.65535, 0\.\.2147483647"):
        rgb(grey(np.array([[-3, 9]], np.int32)))


# ---- files


def save(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


FILES = {  # (name, mode) of files with more than eight bits
    "16 bits.png": ("I;16", GREY["I;16"]),
    "16 bits.tif": ("I;16", GREY["I;16"]),
    "32 bits.tif": ("I", GREY["I to 65535"]),
    "floats.tif": ("F", GREY["F to 1"]),
    "floats to 255.tif": ("F", GREY["F to 255"]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_with_more_than_eight_bits(name: str, tmp_path: Path) -> None:
    mode, picture = FILES[name]
    path = save(tmp_path / name, picture)
    with Image.open(path) as stored:
        assert stored.mode == mode
    np.testing.assert_array_equal(np.asarray(open_image(path)), in_rgb(GREYS))


def test_a_dark_file_of_32_bits_stays_dark(tmp_path: Path) -> None:
    """Integers read from a file have 16 bits at least: 200 of 65535 is black."""
    path = save(tmp_path / "dark.tif", grey(np.array([[0, 200]], np.int32)))
    assert np.asarray(open_image(path)).max() == 1


def test_a_grey_of_16_bits_that_a_file_calls_transparent(tmp_path: Path) -> None:
    path = save(tmp_path / "clear.png", GREY["I;16"], transparency=0)
    np.testing.assert_array_equal(np.asarray(open_image(path)), in_rgb(np.where(GREYS == 0, 255, GREYS)))


# what a viewer does for EXIF orientations 1..8, from the standard's table
TURNED: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda a: a,
    lambda a: a[:, ::-1],
    lambda a: a[::-1, ::-1],
    lambda a: a[::-1],
    lambda a: a.T,
    lambda a: np.rot90(a, -1),
    lambda a: a[::-1, ::-1].T,
    lambda a: np.rot90(a, 1),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_cameras_notes_are_followed(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "webp" else {}
    path = save(tmp_path / f"turned.{kind}", GREY["RGB"], exif=exif, **lossless)
    np.testing.assert_array_equal(np.asarray(open_image(path)), in_rgb(TURNED[orientation - 1](GREYS)))


def test_a_turned_photograph(tmp_path: Path) -> None:
    """JPEG loses colour, not sides."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :32] = 255  # white on the left, which is on top when the camera is turned
    shown = np.asarray(open_image(save(tmp_path / "photo.jpg", Image.fromarray(stored), exif=exif)))
    assert shown.shape == (64, 32, 3) and shown[:24].min() > 200 and shown[40:].max() < 50


def test_a_broken_note_says_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "note.png", GREY["RGB"], exif=b"Exif\0\0no such thing")
    np.testing.assert_array_equal(np.asarray(open_image(path)), in_rgb(GREYS))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_pictures_is_taken_with_one_warning(kind: str, tmp_path: Path) -> None:
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    path = save(tmp_path / f"moves.{kind}", black, save_all=True, append_images=[white, black])
    with pytest.warns(UserWarning) as caught:
        picture = open_image(path)
    assert (
        len(caught) == 1
        and str(caught[0].message) == f"{path}: shows 3 pictures one after the other, the first is taken"
    )
    assert not np.asarray(picture).any()


@pytest.mark.parametrize(("kind", "others"), [("gif", 0), ("png", 0), ("webp", 0), ("mpo", 1)])
def test_one_picture_is_no_reason_to_warn(kind: str, others: int, tmp_path: Path) -> None:
    """MPO: phones keep more versions of one photograph."""
    more = {"save_all": True, "append_images": [GREY["RGB"]] * others} if others else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(save(tmp_path / f"one.{kind}", GREY["RGB"], **more))


# ---- what is no picture


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Files with the reason why they are refused."""
    folder = tmp_path_factory.mktemp("broken")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    made = {kind: save(folder / f"whole.{kind}", noise) for kind in ("png", "jpg", "webp", "gif", "tif", "bmp")}
    for kind, path in made.items():
        (folder / f"cut.{kind}").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    save(folder / "nan.tif", grey(np.array([[0, np.nan]], np.float32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(folder / "bomb.png", Image.new("1", (20_000, 20_000)))
        save(folder / "huge.png", Image.new("1", (8_001, 8_000)))
    return {
        **{f"cut.{kind}": (folder / f"cut.{kind}", "damaged|not an image that can be read") for kind in made},
        "missing": (folder / "none.png", "no such file"),
        "folder": (folder, "is a folder"),
        "empty": (folder / "empty.png", "the file is empty"),
        "text": (folder / "text.png", "not an image that can be read"),
        "NaN": (folder / "nan.tif", r"pixels from nan to nan \(float32\)"),
        "bomb": (folder / "bomb.png", "400000000 pixels.* at most 64 million"),
        "huge": (folder / "huge.png", "8001 x 8000 pixels; at most 64 million"),
    }


KINDS = [
    "cut.png",
    "cut.jpg",
    "cut.webp",
    "cut.gif",
    "cut.tif",
    "cut.bmp",
    "missing",
    "folder",
    "empty",
    "text",
    "NaN",
    "bomb",
    "huge",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_picture_gets_one_error(kind: str, broken: dict[str, tuple[Path, str]]) -> None:
    path, why = broken[kind]
    with pytest.raises(ValueError, match=why) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"--image {path}: ") and len(str(caught.value).splitlines()) == 1


def test_whatever_a_damaged_file_does_to_its_decoder(tmp_path: Path) -> None:
    """Bytes changed at random: a picture or a ValueError of one line, nothing else."""
    rng, path, refused = np.random.default_rng(0), tmp_path / "damaged", 0
    noise = Image.fromarray(rng.integers(0, 256, (12, 15, 3), np.uint8))
    for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp", "dds", "ico"):
        whole = np.frombuffer(save(tmp_path / kind, noise, format=kind).read_bytes(), np.uint8)
        for _ in range(25):
            bytes_ = whole.copy()
            bytes_[rng.integers(0, min(len(whole), 300), 6)] = rng.integers(0, 256, 6)
            path.write_bytes(bytes_.tobytes())
            try:
                assert open_image(path).mode == "RGB"
            except ValueError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1
    assert 50 < refused < 200


# ---- addresses


@pytest.mark.parametrize(
    "given", ["https://x.org/a.png", "http://x.org/a.png", "s3://bucket/a.png", "data:image/png;base64,AAAA"]
)
def test_addresses_are_not_opened(given: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_image(Path(given))
    assert str(caught.value).startswith(
        f"--image {given}: a URL is not opened"
    ) and "download the file and give its path" in str(caught.value)


URL = "https://x.org/a.png"


def test_addresses_in_files_of_questions_and_conversations(tmp_path: Path) -> None:
    asked, said = tmp_path / "asked.jsonl", tmp_path / "said.json"
    asked.write_text(json.dumps({"image": URL, "question": "q", "answer": "a"}))
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    said.write_text(json.dumps([{"image": URL, "conversations": turns}]))
    with pytest.raises(ValueError, match=rf"asked\.jsonl, line 1: {URL}: a URL is not opened"):
        tasks.task(str(asked))
    with pytest.raises(ValueError, match=rf"row 0 .*: {URL}: a URL is not opened"):
        conversations([str(said)])


# ---- everywhere the same


def deep(folder: Path) -> Path:
    """A file of 16 bits, 90 % black: it looks white where its numbers are cut to eight bits."""
    values = np.full((112, 112), 6554, np.uint16)
    values[:28, :28] = 65535
    return save(folder / "deep.png", Image.fromarray(values))


def expected() -> np.ndarray:
    values = np.full((112, 112), 26, np.uint8)  # 6554 / 257
    values[:28, :28] = 255
    return in_rgb(values)


def test_every_way_in_opens_pictures_alike(tmp_path: Path) -> None:
    path = deep(tmp_path)
    (tmp_path / "asked.jsonl").write_text(json.dumps({"image": path.name, "question": "q", "answer": "a"}))
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "said.json").write_text(json.dumps([{"image": path.name, "conversations": turns}]))
    opened = {
        "a file": open_image(path),
        "a question": tasks.task(str(tmp_path / "asked.jsonl")).ask(0, 0).images[0],
        "a conversation": conversations([str(tmp_path / "said.json")])[0].images[0],
    }
    for name, picture in opened.items():
        np.testing.assert_array_equal(np.asarray(picture), expected(), err_msg=name)


def test_every_way_in_converts_pictures_alike(tmp_path: Path) -> None:
    """A picture that the user opened gives the model the pixels of its file."""
    path = deep(tmp_path)
    model, processor = tiny.load()
    loaded = LoadedModel("tiny", model, processor)
    same = loaded.inputs([Image.fromarray(expected())], "q")["pixel_values"]
    assert torch.equal(loaded.inputs([Image.open(path)], "q")["pixel_values"], same)
    taken: list[torch.Tensor] = []

    def note(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append((*args, *kwargs.values())[0])

    engine = Engine("tiny", parse_arguments("none", None, None, {}), device="cpu")
    engine.model.model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    asked = [{"role": "user", "content": [{"type": "image", "image": Image.open(path)}, {"type": "text", "text": "q"}]}]
    engine.answer("t", [asked], {"max_new_tokens": 1})
    assert len(taken) == 1 and torch.equal(taken[0], same)


def test_drawings_show_the_picture_of_the_file(tmp_path: Path) -> None:
    span = SpanTrace(Span(0, 0, 4, (2, 2)), {}, (StageTrace(0, (0, 1, 2, 3), ()),))
    by_hand = np.asarray(draw(Image.fromarray(expected()), span))
    np.testing.assert_array_equal(np.asarray(draw(Image.open(deep(tmp_path)), span)), by_hand)
    np.testing.assert_array_equal(np.asarray(model_view(Image.open(deep(tmp_path)), None, object())), expected())


CLIPS: dict[str, Callable[[np.ndarray], Any]] = {
    "uint16": lambda clip: clip,
    "frames of uint16": list,
    "float to 1": lambda clip: clip / 65535,
    "frames to 1": lambda clip: [frame / 65535 for frame in clip],
    "tensor [T, 3, H, W]": lambda clip: torch.tensor(clip / 65535).permute(0, 3, 1, 2),
    "pictures of 16 bits": lambda clip: [Image.fromarray(frame[..., 0].copy()) for frame in clip],
}


@pytest.mark.parametrize("kind", CLIPS)
def test_clips_of_the_embedded_model(kind: str) -> None:
    """One frame is nearly black; it is no 0..1 among 0..255."""
    shades = np.array([1, 40, 80, 120, 160, 200, 230, 255])
    eight = np.broadcast_to(shades[:, None, None, None], (8, 112, 112, 3)).astype(np.uint8)
    _, processor = video.load()
    plain = processor(text="<video> q", videos=eight)["pixel_values_videos"]
    other = processor(text="<video> q", videos=CLIPS[kind](eight.astype(np.uint16) * 257))["pixel_values_videos"]
    assert torch.equal(other, plain)


def test_a_clip_of_floats_has_one_range() -> None:
    shades = np.array([1, 40, 80, 120, 160, 200, 230, 255])
    eight = np.broadcast_to(shades[:, None, None, None], (8, 112, 112, 3)).astype(np.uint8)
    _, processor = video.load()
    plain = processor(text="<video> q", videos=eight)["pixel_values_videos"]
    assert torch.equal(processor(text="<video> q", videos=list(eight.astype(np.float32)))["pixel_values_videos"], plain)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_pictures_are_opened_and_converted_in_one_file(path: Path) -> None:
    """``Image.open`` and ``.convert`` stand in images.py only."""
    calls = [
        n.func
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    ]
    found = [
        f
        for f in calls
        if f.attr == "convert" or (f.attr == "open" and isinstance(f.value, ast.Name) and f.value.id == "Image")
    ]
    assert not found or path.name == "images.py", [f"{path}:{f.lineno}" for f in found]
