"""``duet-vlm serve --backend transformers``: transformers' own server, with both stages of a method on the one model
that it serves.

The server, its API and its queue are transformers'; here its model is attached to, and unwanted access is closed: other
models, images by URL, requests without the key.
"""

from __future__ import annotations

import json
import logging
import secrets
import traceback
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from importlib.util import find_spec
from typing import Any

from duet_vlm.api.loading import source
from duet_vlm.cli.options import Reduction

NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")  # of transformers[serving]
MOST_MB = 100  # of a request
DEEPEST = 100  # lists and objects of a request within each other
LONGEST = 300  # letters of an error in the log and in an answer
TRANSCRIPTIONS = "/v1/audio/transcriptions"  # for models that hear only; takes forms, which nothing here looks into
TAKES_APART = "transformers.cli.serving"  # modules of the server that read a request, each key as if it were there

# what transformers opens where a request has it: parts of messages, arguments of the processor, assets
MEDIA = frozenset(
    {
        "url",
        "image_url",
        "video_url",
        "audio_url",
        "input_audio",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
        "path",
    }
)
# pictures without data: in front, told from paths by how files of these kinds begin
CODED = frozenset({"base64", "data_base64"})
PICTURES = ("data:", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # PNG, JPEG, GIF, WebP

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = logging.getLogger("uvicorn.error")  # the server's own


def check_installed() -> None:
    """Raise a ValueError where transformers' server cannot run."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(
            f'--backend transformers needs {", ".join(missing)}: pip install ".[serve]" in your clone of duet-vlm'
        )


def run(model: str, reduction: Reduction, host: str, port: int, api_key: str | None, fetch_urls: bool) -> None:
    """Serve until the process is told to stop."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager, server

    path = source(model)[0]
    build = server.build_server

    def guarded_server(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.add_middleware(Guard, api_key=api_key, fetch_urls=fetch_urls)
        return app

    server.build_server = guarded_server  # the server of this process, which serves nothing else
    model_manager.ModelManager = _attaching(model_manager.ModelManager, path, reduction)
    Serve(force_model=path, host=host, port=port)


def _attaching(manager: type[Any], path: str, reduction: Reduction) -> type[Any]:
    """transformers' model manager, with the reduction on the model that it loads, and no other model."""
    from fastapi import HTTPException

    from duet_vlm import handle_of

    class AttachingManager(manager):
        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            if model_id_and_revision.rsplit("@", 1)[0] != path:
                raise HTTPException(400, f"this server serves {path} and loads no other model")
            model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
            if handle_of(model) is None:
                reduction.attach(model, processor)
            return model, processor

    return AttachingManager


class Guard:
    """Checks every request but /health, as an ASGI application: the path is the scope's, which no header can change.

    Refused are requests without the key, larger than ``MOST_MB``, nested deeper than ``DEEPEST``, for a transcription,
    and, unless ``fetch_urls``, with pictures, clips or sounds that are not part of them. What fails behind it is logged
    and answered in ``LONGEST`` letters: errors may quote the request.
    """

    def __init__(
        self, app: Callable[[Message, Receive, Send], Awaitable[None]], api_key: str | None, fetch_urls: bool
    ) -> None:
        self.app, self.api_key, self.fetch_urls = app, api_key, fetch_urls

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        if not self._knows_key(scope):
            return await _refuse(send, 401, "a wrong API key, or none")
        body = await _whole(receive)
        if body is None:
            return await _refuse(send, 413, f"a request of more than {MOST_MB} MB: make its pictures or clips smaller")
        if scope["path"] == TRANSCRIPTIONS:
            return await _refuse(
                send, 400, "this server transcribes no sound: ask about pictures and clips at /v1/chat/completions"
            )
        try:
            refused_url = None if self.fetch_urls else remote(body)
            read(body)
        except ValueError as error:
            return await _refuse(send, 400, str(error))
        if refused_url is not None:
            text = "this server fetches no URLs and opens no files (--fetch-urls); send each picture, clip or sound as one data: URL"
            return await _refuse(send, 400, f"{refused_url}: {text}")
        await self._pass_on(scope, body, receive, send)

    def _knows_key(self, scope: Message) -> bool:
        if self.api_key is None:
            return True
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"").removeprefix(
            b"Bearer "
        )
        return secrets.compare_digest(given, self.api_key.encode())

    async def _pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        waiting, answered = [body], False

        async def again() -> Message:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

        async def sent(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, again, sent)
        except Exception as error:
            text = f"{type(error).__name__}: {_short(str(error))}"
            log.error(
                "%s %s\n%s%s", scope["method"], scope["path"], "".join(traceback.format_tb(error.__traceback__)), text
            )
            if not answered:
                await _refuse(send, *_answer_to(error))


def _answer_to(error: Exception) -> tuple[int, str]:
    """Status and words for what failed: 400 where the request is wrong, be it in a value (a picture that cannot be
    read, a budget that cannot be met) or in its form, at which the code that takes requests apart stumbles; else 500.
    """
    if isinstance(error, ValueError):
        return 400, _short(str(error))
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, LookupError | TypeError | AttributeError) and modules[-1].startswith(TAKES_APART):
        return 400, f"not a request as OpenAI's API has it: {type(error).__name__}: {_short(str(error))}"
    return 500, "the server failed; its log says where"


async def _whole(receive: Receive) -> bytes | None:
    """The body of a request; None where it is too large."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))  # one that is broken off has none
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MOST_MB * 1_000_000:
            return None
    return b"".join(parts)


async def _refuse(send: Send, status: int, text: str) -> None:
    body = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} letters)"


def read(body: bytes) -> Any:
    """The JSON of a request; None where it has none, for which the server has its own error.

    Raises
    ------
    ValueError
        If it is nested too deep.
    """
    deep = f"nested deeper than {DEEPEST} lists and objects"
    try:
        parsed = json.loads(body or b"null")
    except RecursionError:
        raise ValueError(deep) from None
    except ValueError:
        return None
    level = [parsed]
    for _ in range(DEEPEST + 1):
        if not level:
            return parsed
        level = [item for value in level for item in _inside(value) if isinstance(item, list | dict)]
    raise ValueError(deep)


def remote(body: bytes) -> str | None:
    """The first image, video or sound of a request that is not part of it, or may not be; None where all are.

    Part of it is a text that begins with ``data:``, or an object with such a ``url``. All else under the keys that
    transformers opens is refused, at any depth, except in descriptions of ``tools``, which are text.
    """
    parsed = read(body)
    if isinstance(parsed, dict):
        parsed = {key: value for key, value in parsed.items() if key != "tools"}
    return next(
        (
            f"{key}: {value[:80] if isinstance(value, str) else _short(json.dumps(value))}"
            for key, value in _opened(parsed)
        ),
        None,
    )


def _opened(value: Any) -> Iterator[tuple[str, Any]]:
    """Values that would be opened from elsewhere, each with its key."""
    if isinstance(value, dict):
        if "processor_kwargs" in value:  # more doors to the same: images, videos, load_audio_from_video
            yield "processor_kwargs", value["processor_kwargs"]
        yield from ((key, item) for key, item in value.items() if key in MEDIA | CODED and not _enclosed(key, item))
    for item in _inside(value):
        yield from _opened(item)


def _enclosed(key: str, value: Any) -> bool:
    if isinstance(value, dict):
        # becomes a data: URL
        spoken = key == "input_audio" and isinstance(value.get("data"), str) and bool(value.get("format"))
        return spoken or isinstance(value.get("url"), str)  # which is judged by itself
    return value is None or isinstance(value, str) and value.startswith(PICTURES if key in CODED else "data:")


def _inside(value: Any) -> list[Any]:
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
