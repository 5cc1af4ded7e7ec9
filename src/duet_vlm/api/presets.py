"""Settings of papers and of their released code, by name.

A preset is a method with its settings fixed, as published for one model: ``attach(model,
duet_vlm.preset("duet-192"))``. A budget instead (``attach(model, "duet", budget=192)``) solves the same arithmetic for
any model and takes this library's defaults, which differ from the released code (see each method). Names end in the
mean token count that the settings are known by.
"""

from __future__ import annotations

from dataclasses import dataclass

from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.utils.suggest import did_you_mean

LLAVA, QWEN, VIDEO_LLAVA = "LLaVA-1.5-7B", "Qwen2.5-VL-7B", "Video-LLaVA-7B"

DUET = "AMD-AGI/DUET-VLM"
VISIONZIP = "VisionZip paper; the released code's CLS row counts as a dominant token"
REROUTE = "elmma/mllm-reroute, its budgets"
UNPUBLISHED = "no settings published for this budget; solved under the schedule of"


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    Attributes
    ----------
    reducer : Reducer
        The method with its settings.
    model : str
        The checkpoint that the settings are for.
    tokens, depth : int
        Visual tokens of one image (of one frame, for video) there, and decoder layers. Images of Qwen2.5-VL differ in
        size: an example.
    mean : float
        Visual tokens per decoder layer that the settings mean there, by their own arithmetic.
    published : bool
        Whether authors published these settings. False: solved by us for a budget of which only the result was
        published.
    source : str
        Where they stand, or what they are solved from.
    """

    reducer: Reducer
    model: str
    tokens: int
    depth: int
    mean: float
    published: bool
    source: str


def _llava(reducer: Reducer, mean: float, published: bool, source: str) -> Preset:
    return Preset(reducer, LLAVA, 576, 32, mean, published, source)


def _qwen(reducer: Reducer, tokens: int, mean: float, published: bool, source: str) -> Preset:
    return Preset(reducer, QWEN, tokens, 28, mean, published, source)


def _powers(share: float) -> Schedule:
    """The early stages that PyramidDrop's authors give for small budgets: share, share^2, share^3."""
    return ((2, share), (8, share**2), (16, share**3))


def _reroute(early: float, middle: float, late: float) -> PyramidDrop:
    """Reroute with falling shares at its four decisions."""
    return PyramidDrop.official_reroute(((2, early), (7, early), (15, middle), (23, late)))


def _flat(share: float) -> PyramidDrop:
    """Reroute with one share at four decisions."""
    return PyramidDrop.official_reroute(tuple((layer, share) for layer in (3, 7, 15, 23)))


# half of the entering tokens from half of the depth on, none from three quarters on
OF_32, OF_28 = ((16, 0.5), (24, 0.0)), ((14, 0.5), (21, 0.0))

PRESETS: dict[str, Preset] = {
    "duet-192": _llava(Duet.official_llava(300, 7, schedule=OF_32), 191.75, True, f"{DUET}, scripts/llava/v1_5"),
    "duet-128": _llava(Duet.official_llava(170, 35, schedule=OF_32), 128.0, True, f"{DUET}, README example"),
    "duet-64": _llava(Duet.official_llava(85, 17, schedule=OF_32), 63.75, False, f"{UNPUBLISHED} duet-128"),
    "duet-qwen2.5-vl-440": _qwen(
        Duet.official_qwen25(540, 100, schedule=((14, 0.5), (21, 0.25))), 1280, 440.0, True,
        f"{DUET}, scripts/qwen ('640'); the released code keeps 460 because its second stage miscounts",
    ),
    "duet-qwen2.5-vl-160": _qwen(Duet.official_qwen25(212, 44, schedule=OF_28), 1280, 160.0, False, f"{UNPUBLISHED} duet-qwen2.5-vl-128"),
    "duet-qwen2.5-vl-128": _qwen(Duet.official_qwen25(170, 35, schedule=OF_28), 1280, 128.0, True, f"{DUET}, docstring of the Qwen package"),
    "duet-qwen2.5-vl-ratio": _qwen(
        Duet.official_qwen25(0.65, 0.05, schedule=((7, 0.75), (14, 0.5), (21, 0.25))), 1280, 560.0, True,
        f"{DUET}, qwen2_5_vl/README.md; fractions of the image, 43.75 % on average",
    ),
    # 160 + 32 rows of each frame's 257: the model of transformers feeds the CLS row of frames, it need not be added
    "duet-video-llava-960": Preset(
        Duet.official_llava(160, 32, schedule=OF_32, options=TokenOptions(text_query="last", cls_token=False)), VIDEO_LLAVA, 257, 32, 120.0, True,
        f"{DUET}, scripts/videollava; per frame, 960 per clip of 8. The released code drops tokens of the first frame only: 1464",
    ),
    "visionzip-192": _llava(VisionZip.official(162, 30), 192.0, True, VISIONZIP),
    "visionzip-128": _llava(VisionZip.official(108, 20), 128.0, True, VISIONZIP),
    "visionzip-64": _llava(VisionZip.official(54, 10), 64.0, True, VISIONZIP),
    "pyramiddrop-270": _llava(PyramidDrop.official(), 270.0, True, "PyramidDrop paper and released defaults"),
    "pyramiddrop-192": _llava(PyramidDrop.official(_powers(0.56)), 191.875, False, f"{UNPUBLISHED} pyramiddrop-64"),
    "pyramiddrop-128": _llava(PyramidDrop.official(_powers(0.42)), 127.4375, False, f"{UNPUBLISHED} pyramiddrop-64"),
    "pyramiddrop-64": _llava(PyramidDrop.official(_powers(0.19)), 62.9375, True, "Cooperx521/PyramidDrop issue 29, the author's answer"),
    "pyramiddrop-reroute-192": _llava(_reroute(0.4502, 0.2251, 0.1126), 191.46875, True, REROUTE),
    "pyramiddrop-reroute-128": _llava(_reroute(0.2655, 0.1328, 0.0664), 127.4375, True, REROUTE),
    "pyramiddrop-reroute-84": _llava(_reroute(0.1392, 0.0696, 0.0348), 84.125, True, f"{REROUTE}, named 64 there"),
    "pyramiddrop-reroute-flat-192": _llava(_flat(0.2644), 191.75, True, f"{REROUTE}, in place of FastV"),
    "pyramiddrop-reroute-flat-128": _llava(_flat(0.1418), 127.40625, True, f"{REROUTE}, in place of FastV"),
    "pyramiddrop-reroute-flat-64": _llava(_flat(0.01916), 63.96875, True, f"{REROUTE}, in place of FastV"),
    "fastv-306": _llava(FastV.official(), 306.0, True, "FastV paper: K = 2, R = 50 %"),
    "fastv-171": _llava(FastV.official(keep=0.25), 171.0, True, "FastV paper: K = 2, R = 75 %"),
    "fastv-315": _llava(FastV.official("lmms"), 315.0, True, "pkunlp-icler/FastV, its lmms-eval model: K = 3, R = 50 %"),
}  # fmt: skip


def preset(name: str) -> Reducer:
    """The method of a preset with its settings, ready for ``attach``.

    Raises
    ------
    ValueError
        If there is no such preset; the message lists those that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name].reducer
