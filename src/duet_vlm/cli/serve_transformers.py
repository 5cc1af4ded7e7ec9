"""``duet-vlm serve --backend transformers``: transformers' own server, with both stages of a method on the one model that it serves.

The server, its API and its queue are transformers'; here its model is attached to, and what it would let anybody do is closed: other models,
pictures by URL, requests without the key.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

from duet_vlm.cli.options import Reduction
from duet_vlm.loading import source

NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")  # of transformers[serving]


def check_installed() -> None:
    """Raise a ValueError where transformers' server cannot run."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"--backend transformers needs {', '.join(missing)}: pip install \".[serve]\" in your clone of duet-vlm")


def run(model: str, reduction: Reduction, host: str, port: int, api_key: str | None, fetch_urls: bool) -> None:
    """Serve until the process is told to stop."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager, server

    place = source(model)[0]
    build = server.build_server

    def guarded_server(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.middleware("http")(_guard(api_key, fetch_urls))
        return app

    server.build_server = guarded_server  # the server of this process, which serves nothing else
    model_manager.ModelManager = _attaching(model_manager.ModelManager, place, reduction)
    Serve(force_model=place, host=host, port=port)


def _attaching(manager: type[Any], place: str, reduction: Reduction) -> type[Any]:
    """transformers' model manager, with the reduction on the model that it loads, and no other model."""
    from fastapi import HTTPException

    from duet_vlm import handle_of

    class Attaching(manager):
        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            if model_id_and_revision.rsplit("@", 1)[0] != place:
                raise HTTPException(400, f"this server serves {place} and loads no other model")
            model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
            if handle_of(model) is None:
                reduction.attach(model, processor)
            return model, processor

    return Attaching


def _guard(api_key: str | None, fetch_urls: bool) -> Callable[[Any, Callable[[Any], Awaitable[Any]]], Awaitable[Any]]:
    """What stands in front of every request but /health."""

    async def guard(request: Any, go_on: Callable[[Any], Awaitable[Any]]) -> Any:
        from fastapi.responses import JSONResponse

        if request.url.path != "/health":
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if api_key is not None and not secrets.compare_digest(given.encode(), api_key.encode()):
                return JSONResponse({"error": "a wrong API key, or none"}, 401)
            if not fetch_urls and (url := remote(await request.body())) is not None:
                return JSONResponse({"error": f"{url[:80]}: this server fetches no URLs and opens no files (--fetch-urls); send data: URLs"}, 400)
        return await go_on(request)

    return guard


def remote(body: bytes) -> str | None:
    """The first picture, clip or sound of a request that is not part of it; None where all are."""
    try:
        found = json.loads(body or b"null")
    except ValueError:
        return None  # the server says what is wrong with it

    def urls(value: Any) -> list[str]:
        if isinstance(value, list):
            return [url for item in value for url in urls(item)]
        if not isinstance(value, dict):
            return []
        here = [value[key] for key in ("url", "image_url", "video_url", "audio_url") if isinstance(value.get(key), str)]
        return here + [url for item in value.values() for url in urls(item)]

    return next((url for url in urls(found) if not url.startswith("data:")), None)
