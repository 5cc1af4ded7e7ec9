"""Methods for clips: the released counts, which follow from the data, given to the presets' own rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from duet_vlm import EncoderView, SpanPlan
from duet_vlm.methods.video.evs import EVS
from duet_vlm.methods.video.fastvid import FastVID
from duet_vlm.methods.video.holitom import HoliTom
from duet_vlm.methods.video.prunevid import PruneVid
from duet_vlm.methods.video.vidcom2 import VidCom2
from duet_vlm.methods.video.video_base import VideoRows
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.static_regions import StaticDynamicSets, gains
from duet_vlm.ops.video import FrameWindows, VideoTokens, join_windows
from golden_runner.case import STATE, Case

RELATIVE = {"relative": 1e-5, "absolute": 1e-6}


def clip_of(frames: int, places: int) -> VideoTokens:
    parts = torch.arange(frames).repeat_interleave(places)[None]
    return VideoTokens.of(parts, parts >= 0)


def check_vidcom2(case: Case) -> None:
    features = case.tensors["in/features"][None]
    frames, places = case.config["frames"], case.config["tokens_per_frame"]
    clips = clip_of(frames, places)
    for run, settings in case.runs.items():
        base = settings["base_scale"]
        reducer = VidCom2.official(base)
        rows = clips.grid(features)
        spread = features.float().var(1, correction=0)
        case.same(run, "channels", spread.argsort(dim=1, stable=True)[0, : features.shape[2] // 2].sort().values)
        to_clip, to_frame = reducer.likeness(rows, clips)
        case.close(run, "video_score", to_clip[0], RELATIVE)
        case.close(run, "frame_score", to_frame[0], RELATIVE)
        scale = (base * reducer.scale(to_clip, clips)).clamp(max=1)
        case.close(run, "frame_scale", scale[0], RELATIVE)
        counts = (scale * places).round().long().clamp(min=1)
        case.same(run, "kept_per_frame", counts[0])
        kept = reducer.chosen(clips, to_clip + to_frame, counts)[0]
        case.same(run, "kept_index", kept.nonzero()[:, 0])
        case.fact(run, "kept", int(kept.sum()))
        if case.has(run, "kept_index_in_grid"):  # the flow keeps newline rows where they stand
            side = round(places**0.5)
            order = released_order(kept, frames, side)
            case.same(run, "kept_index_in_grid", order)
            case.close(
                run, "output", case.tensors["in/grid_features_with_newline"][order], {"relative": 0.0, "absolute": 0.0}
            )
        else:
            case.close(run, "output", features[0, kept], {"relative": 0.0, "absolute": 0.0})


def released_order(kept: Tensor, frames: int, side: int) -> list[int]:
    """Rows of grids with a newline behind every line: those of each frame that are kept, then all its newlines."""
    order = []
    for frame in range(frames):
        start = frame * side * (side + 1)
        place = kept[frame * side * side : (frame + 1) * side * side].nonzero()[:, 0]
        order += [start + int(p) // side * (side + 1) + int(p) % side for p in place]
        order += [start + line * (side + 1) + side for line in range(side)]
    return order


def check_fastvid(case: Case) -> None:
    start, frames, places = (case.config[name] for name in ("video_start", "frames", "tokens_per_frame"))
    prompt, clips = case.tensors["in/inputs_embeds"][0], clip_of(frames, places)
    features, attention = prompt[None, start : start + frames * places], case.tensors["in/frame_attention"][None]
    for run, settings in case.runs.items():
        names = {
            "context": "STPrune_d",
            "segments": "DySeg_c",
            "threshold": "DySeg_tau",
            "every": "DTM_p",
            "own": "DTM_beta",
        }
        reducer = FastVID.official(**{name: settings[f"fastvid_{theirs}"] for name, theirs in names.items()})
        rows, length = clips.grid(features), torch.tensor([frames])
        windows = reducer.windows(case.tensors["in/frame_global_features"][None], length)
        count = int(windows.number.max()) + 1
        case.same(run, "segments", torch.stack([windows.first, windows.first + windows.length - 1], -1)[0, :count])
        keep = int(places * settings["fastvid_retention_ratio"])
        context = int(keep * settings["fastvid_STPrune_d"])
        salient = reducer.salient(attention, clips, torch.full((1, frames), keep - context))
        gives, share = reducer.frames(windows, length)
        peak = reducer.peaks(rows, clips.real & ~salient, (context * share + 1e-6).floor().long() * gives)
        kept = clips.rows(salient | peak)
        owner, weight = reducer.joins(clips, rows, kept, peak, windows)
        selection = join_windows(kept, owner, weight, int(kept.sum()))
        positions = selection.index[0] + start
        behind = torch.arange(start + frames * places, len(prompt))
        case.same(run, "kept_positions", torch.cat([torch.arange(start), positions, behind]))
        merged = merged_rows(features, selection)[0]
        case.close(run, "hidden_states", torch.cat([prompt[:start], merged, prompt[behind]]), STATE)
        case.fact(run, "video_rows", len(merged))


def check_evs(case: Case) -> None:
    features = case.tensors["in/video_embeds"][None]
    grid = case.meta["grid"]
    steps, places = grid["T"], grid["tokens_per_frame"]
    tokens = features.shape[1]
    parts = torch.arange(steps).repeat_interleave(places)[None]
    for run, settings in case.runs.items():
        reducer = EVS.official(settings["q"])
        # the first step stays whole; a plan does not know how large it is
        kept = max(places, reducer.plan(tokens, 1, None).entry)
        plan = SpanPlan(tokens, kept, 0, (kept,))
        view = EncoderView(
            parts >= 0,
            torch.tensor([kept]),
            torch.tensor([0]),
            (plan,),
            features=features,
            parts=parts,
            modality="video",
            max_parts=(steps, places),
        )
        index = reducer.select_tokens(view).index[0]
        if case.has(run, "positions"):
            check_evs_positions(case, run, index)
            continue
        case.fact(run, "kept", kept)
        case.same(run, "kept_index", index)
        case.same(run, "mask", torch.zeros(tokens, dtype=torch.long).scatter(0, index, 1))


def check_evs_positions(case: Case, run: str, kept: Tensor) -> None:
    """Kept tokens have the positions that they had. The text behind them does, too, where the released code moves it
    forward by as much as the largest extent exceeds the width of the grid; ours leaves it at the largest position + 1,
    as the model itself has it."""
    settings, grid, positions = case.runs[run], case.meta["grid"], case.out(run, "positions")
    sides = [grid["T"], grid["H"] // grid["spatial_merge_size"], grid["W"] // grid["spatial_merge_size"]]
    every = torch.cartesian_prod(*map(torch.arange, sides), torch.tensor(sides[2:]))
    every[:, 0] = (every[:, 0] * settings["tokens_per_second"] * settings["video_second_per_grid"]).long()
    case.same(run, "media_positions_all", every)
    case.same(run, "media_positions_kept", every[kept])
    ids = case.tensors["in/input_ids"]
    video, base = ids == settings["video_token_id"], int((ids == settings["vision_start_token_id"]).nonzero()[0]) + 1
    ours = positions.clone()
    ours[:, video] = every[kept, :3].T + base
    moved = every[0, 3] - (every[:, :3].max() + 1)
    behind = int(video.nonzero()[-1]) + 1
    text = torch.arange(len(ids) - behind)
    ours[:, behind:] = base + every[:, :3].max() + 1 + text + moved
    case.same(run, "positions", ours)
    case.same(run, "delta", ours.max()[None] + 1 - len(ids))


def check_holitom(case: Case) -> None:
    features, attention = case.tensors["in/features"], case.tensors["in/attention"]
    frames, places = attention.shape
    flat, clips = features.flatten(0, 1)[None], clip_of(frames, places)
    for run, settings in case.runs.items():
        if "error" in settings:
            case.errors.add(run)  # merging dynamic tokens: not an option here
            continue
        own = None if settings["NO_BETA"] else settings["beta"]
        limits = {"neighbours": settings["K"], "window": settings["max_window_size"]}
        reducer = HoliTom.official(settings["retain_ratio"], threshold=settings["tau"], own=own, **limits)
        rows = clips.grid(flat)
        alike = reducer.alike(rows, clips)
        case.close(run, "similarity", alike[0], RELATIVE)
        windows = gains(alike > reducer.threshold, clips.length, reducer.window)
        count = int(windows.number.max()) + 1
        case.same(run, "segments", torch.stack([windows.first, windows.first + windows.length - 1], -1)[0, :count])
        sets = StaticDynamicSets.of(clips, windows, rows, reducer.still(alike, clips, windows)[0])
        saved = frames * places - int(sets.sizes.sum())
        case.fact(run, "pruned_static_tokens", saved)
        ratio = min(settings["retain_ratio"] / ((frames * places - saved) / (frames * places)), 1)
        sizes = sets.sizes[0].tolist()
        counts = torch.tensor(
            [[round(n * ratio) for n in sizes[:frames]] + [math.ceil(n * ratio) for n in sizes[frames:]]]
        )
        found = reducer.merged(sets, clips.grid(attention.flatten()[None]), counts)
        merged = rows_of(flat, found)
        case.close(run, "output", merged, STATE)
        of_window = windows.number.gather(1, clips.step)[0][found.kept[0]]
        case.same(run, "rows_per_segment", of_window.bincount(minlength=count))
        case.fact(run, "rows", len(merged))


def rows_of(features: Tensor, found: VideoRows) -> Tensor:
    return merged_rows(
        features, join_windows(found.kept, found.owner, found.weight, int(found.kept.sum()), found.order)
    )[0]


def check_prunevid(case: Case) -> None:
    features = case.tensors["in/features"]
    frames, places = features.shape[:2]
    flat, clips = features.flatten(0, 1)[None], clip_of(frames, places)
    for run, settings in case.runs.items():
        reducer = PruneVid.official(
            windows=settings["temporal_segment_ratio"], threshold=settings["threshold"], neighbours=settings["k"]
        )
        rows = clips.grid(flat)
        windows = reducer.cut(rows, clips)
        count = int(windows.number.max()) + 1
        case.same(run, "window_sizes", windows.length[0, :count])
        sets = StaticDynamicSets.of(clips, windows, rows, reducer.still(rows, clips, windows)[0])
        counts = torch.tensor(
            [[size if size <= 14 else int(size * settings["cluster_ratio"]) for size in sets.sizes[0].tolist()]]
        )
        case.same(run, "static_sizes", counts[0, :count])
        of_window = torch.zeros(1, frames, dtype=torch.long).scatter_add_(1, windows.number, counts[:, frames:])
        case.same(run, "dynamic_sizes", of_window[0, :count])
        merged = rows_of(flat, reducer.merged(sets, counts))
        case.close(run, "output", merged, STATE)
        case.fact(run, "rows", len(merged))
        # the stage inside the decoder: rows stand in the order of their sets
        sizes = [int(n) for window in range(count) for n in (counts[0, window], *dynamic_of(windows, counts, window))]
        group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]
        scores = case.tensors[f"in/attention_{run}"].amax((1, 2))
        for name in case.names(run, "alpha"):
            alpha = int(name.split("/")[0].removeprefix("alpha")) / 100
            quota = torch.tensor([[int(n * alpha) for n in sizes]])
            kept = reducer.of_sets(scores, group, torch.ones_like(group, dtype=torch.bool), quota)
            case.same(run, name, kept[0].nonzero()[:, 0])


def dynamic_of(windows: FrameWindows, counts: Tensor, window: int) -> Tensor:
    """Rows of what moves in every frame of a window."""
    return counts[0, counts.shape[1] // 2 :][windows.number[0] == window]
