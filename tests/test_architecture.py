"""Which room may import which, read from the source; and that importing the package does nothing to anyone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import duet_vlm

ROOT = Path(duet_vlm.__file__).parent

# room -> rooms (or modules) of the package that it may import from, besides itself
ARROWS = {
    "ops": {"tokens"},
    "tokens": {"ops"},
    "budget": set(),
    "text": set(),
    "video": set(),
    "hooks": set(),
    "spelling": set(),
    "checks": {"budget", "flow", "models", "reducer", "spelling"},
    "parts": {"budget"},
    "reducer": {"budget", "tokens"},
    "registry": {"reducer"},
    "measure": {"budget", "reducer", "spelling", "tokens"},
    "memory": {"budget", "reducer"},
    "models": {"hooks", "measure", "ops", "tokens"},
    "methods": {"budget", "ops", "reducer", "registry", "tokens"},
    "presets": {"budget", "methods", "reducer", "spelling"},
    "flow": {"budget", "models", "ops", "reducer", "text", "tokens"},
    "accounts": {"flow", "measure", "models", "reducer"},
    "attach": {"accounts", "budget", "checks", "flow", "hooks", "measure", "memory", "models", "parts", "reducer", "registry", "tokens"},
}
USERS = {"bench", "cli", "evaluate", "loading", "serve", "tiny", "train", "viz"}  # see the library as anyone outside does
PRIVATE = {"flow", "hooks", "ops", "methods"}  # what outsiders have no business with


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import of the package in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "duet_vlm":
            public = [alias.name in duet_vlm.__all__ for alias in node.names]
            names = ["duet_vlm" if known else f"duet_vlm.{alias.name}" for known, alias in zip(public, node.names, strict=True)]
            found += [(name, node.lineno) for name in (names if node.module == "duet_vlm" else [node.module])]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "duet_vlm"]
    return found


FILES = sorted(ROOT.rglob("*.py"))
CORE = [path for path in FILES if room_of(path) not in USERS | {"__init__", "__main__"}]


def test_every_file_belongs_to_a_room() -> None:
    assert len(CORE) > 25
    assert {room_of(path) for path in CORE} == set(ARROWS)


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    room = room_of(path)
    wrong = []
    for name, line in imports(path):
        target = name.split(".")[1] if "." in name else "__init__"
        if target != room and target not in ARROWS[room]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in USERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_users_of_the_library_stay_outside(path: Path) -> None:
    targets = {(name.split(".")[1], line) for name, line in imports(path) if "." in name}
    assert not [(target, line) for target, line in targets if target in PRIVATE or (target == "cli" and room_of(path) != "cli")]


def test_methods_decide_and_the_flow_acts() -> None:
    assert not ARROWS["methods"] & {"flow", "models", "attach"}
    assert "methods" not in ARROWS["flow"] and "methods" not in ARROWS["models"]
    assert not any(rooms & USERS for rooms in ARROWS.values())  # nobody depends on the users of the library


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in ("flow", "attach", "measure")], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_branches_on_concrete_methods_or_models(path: Path) -> None:
    words = {"llava", "qwen", "duet", "fastv", "visionzip", "pyramiddrop"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            literals = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            assert not any(word in text.lower() for text in literals for word in words), f"{path}:{node.lineno}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_changes_nothing() -> None:
    """No class of torch or transformers is patched, no attention function registered, no torchvision loaded."""
    code = """
import sys, torch, transformers
from torch import nn
from transformers import LlavaForConditionalGeneration as A, Qwen2_5_VLForConditionalGeneration as B, GenerationMixin, PreTrainedModel, DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
classes = [nn.Module, torch.Tensor, A, B, GenerationMixin, PreTrainedModel, DynamicCache, LlamaDecoderLayer]
before = [dict(vars(c)) for c in classes], sorted(ALL_ATTENTION_FUNCTIONS.keys()), "torchvision" in sys.modules
import duet_vlm
duet_vlm.methods()
after = [dict(vars(c)) for c in classes], sorted(ALL_ATTENTION_FUNCTIONS.keys()), "torchvision" in sys.modules
print(before == after)
"""
    assert run(code) == "True"


def test_importing_loads_nothing_large() -> None:
    """Public names are loaded when they are used; type checkers read them in a block of their own, which says the same."""
    loaded = "[name for name in ('torch', 'transformers', 'numpy', 'typer') if name in sys.modules]"
    assert run(f"import sys, duet_vlm; dir(duet_vlm); print({loaded})") == "[]"
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    said = {name.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert said == {name: f"duet_vlm.{home}" for name, home in duet_vlm._HOMES.items()}
    assert sorted(said) == duet_vlm.__all__ and set(duet_vlm.__all__) <= set(dir(duet_vlm))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        duet_vlm.atach  # noqa: B018
    with pytest.raises(ImportError, match="atach"):
        from duet_vlm import atach  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize("first", ["duet_vlm.attach", "duet_vlm.methods.fastv", "duet_vlm.cli.main", "duet_vlm"])
def test_files_do_not_replace_the_functions_that_they_are_called_as(first: str) -> None:
    code = f"import {first}\nimport duet_vlm, inspect\nfrom duet_vlm import attach, methods\n"
    code += "print(all(map(inspect.isfunction, (attach, methods, duet_vlm.attach, duet_vlm.methods))), attach is duet_vlm.attach, len(methods()) > 9)"
    assert run(code) == "True True True"


def test_any_file_can_be_imported_first() -> None:
    """No order of imports is needed: each file in a package that has loaded nothing yet (torch stays, for the sake of time)."""
    names = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    code = f"""
import importlib, sys, torch, transformers
for name in {names}:
    for known in [known for known in sys.modules if known.split(".")[0] == "duet_vlm"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in ("lmms_eval", "peft", "accelerate", "yaml", "matplotlib", "scipy"):
            print(name, error)
    except ImportError as error:
        print(name, error)
"""
    assert run(code) == ""


def test_torchvision_is_never_imported() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torchvision" for name in names), path


def test_public_names_exist() -> None:
    assert sorted(duet_vlm.__all__) == sorted(set(duet_vlm.__all__))
    assert all(hasattr(duet_vlm, name) for name in duet_vlm.__all__)
