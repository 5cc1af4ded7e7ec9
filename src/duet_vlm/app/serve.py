"""Serving the page, by ``duet-vlm app`` on this machine or in a Hugging Face Space (``examples/space``)."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from duet_vlm.api.loading import LoadedModel
from duet_vlm.app.controls import Controls
from duet_vlm.app.examples import examples, own_sample
from duet_vlm.app.files import MOST_MB, Uploads
from duet_vlm.app.generate import AppSide, answers


def warmed(loaded: LoadedModel, first: Controls) -> None:
    """Ask once before anybody does: the first call of a process pays for what later ones find made. What cannot be
    attached is refused here."""
    from duet_vlm.evaluation import tiny
    from duet_vlm.inputs.video import VideoFrames

    own = own_sample(loaded)
    if own is not None and own.frames:
        frames = own.frames
        shown = Uploads((), (VideoFrames(tuple(frames), tuple(range(len(frames))), len(frames), 1.0),))
    else:
        shown = Uploads((tiny.demo_images()[0].image,), ())
    sides = [AppSide(loaded, chosen, shown, "what is this ?") for chosen in (None, first.read(first.files))]
    try:
        for said in answers(sides, 1):
            if wrong := next((one for one in said if one.error), None):
                raise ValueError(f"{wrong.name}: {wrong.error}")
    finally:
        for side in sides:
            side.close()


def serve(loaded: LoadedModel, first: Controls, host: str | None = None, port: int | None = None) -> None:
    """Serve until the process is told to stop, from its main thread.

    Nothing is shared, counted or kept: no tunnel, no analytics, and uploads in a folder of their own that goes with the
    process. Host and port None: as the environment says (a Space does), else 127.0.0.1 and 7860.
    """
    warmed(loaded, first)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes then, too
    with tempfile.TemporaryDirectory(prefix="duet-vlm-app-") as folder:
        private = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        os.environ.update(private)  # read where Gradio is imported and when it makes its parts
        _open(loaded, first, Path(folder), host, port)


def _open(loaded: LoadedModel, first: Controls, folder: Path, host: str | None, port: int | None) -> None:
    from duet_vlm.app.page import CSS, WAITING, AppPage, theme

    other = Controls("duet" if first.method == "fastv" else "fastv", first.budget or "0.22")
    (folder / "examples").mkdir()
    page: Any = AppPage(loaded, first, other, examples(loaded, folder / "examples")).blocks
    page.queue(max_size=WAITING)
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, max_file_size=f"{MOST_MB}mb", footer_links=[], enable_monitoring=False, ssr_mode=False,
        pwa=False, mcp_server=False, run_history=False, state_session_capacity=1000, quiet=True, show_error=True, prevent_thread_lock=True,
        theme=theme(), css=CSS,
    )  # fmt: skip
    print(f"{loaded.name}: {address} (Ctrl-C ends it)", flush=True)
    try:
        # until a signal; Gradio's own waiting takes Ctrl-C for a good end, in words of its own
        threading.Event().wait()
    finally:
        page.close(verbose=False)
