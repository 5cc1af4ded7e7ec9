"""``duet-vlm generate``: answers to a file or folder of prompts, by one process or many."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from duet_vlm.cli.errors import folder_for
from duet_vlm.cli.options import ChunkFrames, Device, Model, Reduction, StillFrames, pieces_of, resumable

if TYPE_CHECKING:
    from duet_vlm import Handle

EPILOG = "On several GPUs or machines: accelerate launch -m duet_vlm.cli.main generate ...; after a kill, the same command goes on."


@resumable
def generate(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="A .jsonl file with image (or video) and question in each line (id too, if you like), or a folder.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The .jsonl file of the answers; journals are kept beside it in OUT.parts."),
    ],
    reduction: Reduction,
    json_: bool,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question, where --data is a folder of pictures.")
    ] = None,
    model: Model = "tiny",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts that are answered at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 64,
    chunk_frames: ChunkFrames = None,
    still_frames: StillFrames = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what is recorded and begin anew (one process only).")
    ] = False,
    device: Device = None,
) -> None:
    """Answer many prompts into a file. A picture that cannot be read costs its own line only."""
    from duet_vlm.evaluation.prompts import prompts
    from duet_vlm.evaluation.ranks import WorkerRank, gpus

    if prompt is not None and not prompt.strip():
        raise ValueError("--prompt is empty: write a question")
    given, worker = prompts(data, prompt), WorkerRank.here()
    reduction.check_budget(model)
    chunk_settings = pieces_of(chunk_frames, still_frames, given.clips, 'give --data with "video" in its lines')
    folder_for("--out", out.parent)
    from duet_vlm.api.loading import load
    from duet_vlm.evaluation.generate import generate as answers

    if restart:
        worker.check_restart(f"{out}.parts")
        shutil.rmtree(f"{out}.parts", ignore_errors=True)
        out.unlink(missing_ok=True)
    loaded = load(model, worker.device(device, gpus()))

    def advance(done: int, total: int) -> None:
        if not json_:
            typer.echo(f"{worker}: {done} of {total} batches", err=True)

    def attach() -> Handle:
        return reduction.attach(loaded.model, loaded.processor, **chunk_settings)

    complete = answers(
        loaded, given, out, attach, batch=batch, max_new_tokens=max_new_tokens, worker=worker, advance=advance
    )
    if json_:
        print(f'{{"complete": {str(complete).lower()}, "rank": {worker.rank}, "world": {worker.world}}}')
    elif complete:
        typer.echo(f"written: {out} ({len(given.names)} answers)")
    else:
        typer.echo(f"rank {worker.rank} is done; others are not, and the last of them writes {out}", err=True)
