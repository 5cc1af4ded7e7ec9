"""Which room may import which, read from the source; and that importing the package does nothing to anyone."""

from __future__ import annotations

import ast
import contextlib
import io
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

import duet_vlm

ROOT = Path(duet_vlm.__file__).parent

# room -> rooms (or modules) of the package that it imports from, besides itself; "duet_vlm" is the public face
ARROWS = {
    "ops": {"tokens"},
    "tokens": set(),
    "settings": set(),
    "budget": {"settings"},
    "text": {"ops"},
    "pictures": set(),
    "video": {"pictures"},
    "hooks": set(),
    "spelling": set(),
    "checks": {"budget", "contrastive", "flow", "models", "reducer"},
    "parts": {"budget"},
    "calibration": set(),
    "contents": set(),
    "compressor": {"budget", "memory", "ops", "reducer", "settings", "tokens"},
    "dropping": set(),
    "reducer": {"budget", "calibration", "dropping", "settings", "spelling", "tokens", "vision"},
    "vision": {"budget"},
    "contrastive": {"ops"},
    "tower": {"budget", "ops", "reducer", "tokens"},
    "stages": {"budget", "reducer"},
    "registry": {"reducer", "spelling"},
    "measure": {"budget", "compressor", "ops", "reducer", "settings", "spelling", "tokens", "tower", "vision"},
    "palette": set(),
    "memory": {"budget", "reducer", "settings"},
    "stream": {"models", "ops"},
    "models": {"hooks", "measure", "ops", "tokens"},
    "observer": {"budget", "reducer"},
    "methods": {"budget", "calibration", "compressor", "observer", "ops", "reducer", "registry", "settings", "stages", "tokens", "tower", "vision"},
    "presets": {"budget", "methods", "reducer", "spelling"},
    "flow": {"budget", "compressor", "hooks", "models", "ops", "parts", "reducer", "text", "tokens", "tower", "vision"},
    "serve": {"budget", "duet_vlm", "flow", "methods", "ops", "parts", "reducer", "settings", "tower", "vision"},
    "accounts": {"budget", "flow", "measure", "models", "reducer", "tokens"},
    "handle": {"accounts", "budget", "checks", "compressor", "flow", "hooks", "measure", "memory", "models", "reducer", "tokens"},
    "attach": {"budget", "flow", "handle", "memory", "methods", "models", "reducer"},
    "calibrating": {"attach", "calibration", "checks", "methods", "observer", "registry"},
    "duet_vlm": {
        "attach", "budget", "compressor", "handle", "measure", "memory", "methods", "presets", "reducer", "registry", "stages", "tokens", "tower",
    },
}
# the users of the library see it as anyone outside does
USERS = {
    "__main__": {"cli"},
    "tiny": {"pictures"},  # the embedded models: what makes them needs nothing of the library but how a picture is read
    "viz": {"duet_vlm", "palette", "pictures", "tokens"},
    "app": {"budget", "duet_vlm", "loading", "memory", "pictures", "settings", "tiny", "video", "viz"},
    "loading": {"memory", "models", "pictures", "spelling", "tiny", "video"},
    "evaluate": {"budget", "contents", "duet_vlm", "loading", "measure", "models", "palette", "pictures", "spelling", "tiny", "video"},
    "bench": {"accounts", "budget", "duet_vlm", "evaluate", "handle", "loading", "measure", "models", "palette", "parts", "reducer"},
    "tune": {"bench", "contents", "duet_vlm", "evaluate", "loading", "measure", "models", "palette", "pictures", "video"},
    "train": {"budget", "contents", "duet_vlm", "loading", "models", "pictures", "spelling", "text", "tiny"},
    "cli": {
        "app", "bench", "budget", "calibrating", "duet_vlm", "evaluate", "loading", "measure", "memory", "models", "pictures", "presets", "serve",
        "settings", "spelling", "stream", "tiny", "train", "tune", "video", "viz",
    },
}  # fmt: skip
PRIVATE = {"flow", "hooks", "ops", "methods"}  # what outsiders have no business with

FILES = {".".join(("duet_vlm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def file_of(name: str) -> str:
    """The file that an imported name comes from: a module's own, or that of the package which defines it."""
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


def imports(name: str) -> list[tuple[str, int]]:
    """(file, line) of every import of the package in a file, wherever it stands: at the top, in a function, for types only, by a string."""
    home = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(home.split(".")[: len(home.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            public = module == "duet_vlm"  # attach is the function there, not the file
            found += [(module if public and alias.name in duet_vlm.__all__ else f"{module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and name != "duet_vlm":  # says it for types, too
            text = ast.unparse(node.args[0]).lstrip("f").strip("\"'").replace("{__name__}", name)
            folder = text.partition("{")[0].rstrip(".")  # all files of a folder, where the string is put together
            found += [(each, node.lineno) for each in FILES if each == text or ("{" in text and each.rpartition(".")[0] == folder)]
    return [(file_of(target), line) for target, line in found if target.split(".")[0] == "duet_vlm"]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A way along the arrows that ends where it begins; empty where there is none."""
    clear: set[str] = set()

    def walk(at: str, way: list[str]) -> list[str]:
        if at in way:
            return [*way[way.index(at) :], at]
        if at not in clear:
            for target in sorted(arrows.get(at, ())):
                if found := walk(target, [*way, at]):
                    return found
            clear.add(at)
        return []

    return next((found for start in sorted(arrows) if (found := walk(start, []))), [])


def rooms() -> dict[str, set[str]]:
    """The arrows between rooms as the files draw them."""
    found: dict[str, set[str]] = {room_of(name): set() for name in FILES}
    for name in FILES:
        found[room_of(name)] |= {room_of(target) for target, _ in imports(name)} - {room_of(name)}
    return found


def test_every_file_belongs_to_a_room() -> None:
    assert len(FILES) > 100
    assert {room_of(name) for name in FILES} == set(ARROWS) | set(USERS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_arrows(name: str) -> None:
    room = room_of(name)
    allowed = (ARROWS | USERS)[room] | {room}
    assert not [f"{name}:{line} imports {target}" for target, line in imports(name) if room_of(target) not in allowed]


def test_every_arrow_is_used() -> None:
    assert rooms() == ARROWS | USERS


def test_no_circle_between_rooms_or_files() -> None:
    assert not circle(rooms())
    assert not circle({name: {target for target, _ in imports(name)} - {name} for name in FILES})


def test_the_circle_finder_finds_circles() -> None:
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]


def test_methods_decide_and_the_flow_acts() -> None:
    assert not ARROWS["methods"] & {"flow", "models", "attach"}
    assert "methods" not in ARROWS["flow"] and "methods" not in ARROWS["models"]
    assert not any(rooms & set(USERS) for rooms in ARROWS.values())  # nobody depends on the users of the library
    assert not any(rooms & (PRIVATE | {"cli"}) for room, rooms in USERS.items() if room != "__main__")


@pytest.mark.parametrize("name", [name for name in FILES if room_of(name) in ("flow", "attach", "handle", "measure")])
def test_no_branches_on_concrete_methods_or_models(name: str) -> None:
    words = {"llava", "qwen", "duet", "fastv", "visionzip", "pyramiddrop"}
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Compare):
            literals = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            assert not any(word in text.lower() for text in literals for word in words), f"{name}:{node.lineno}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def forked(code: str) -> str:
    """The same in a copy of this process, which has torch and transformers loaded already."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_executed, (code,))


def _executed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    return said.getvalue().strip()


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
duet_vlm.list_methods()
after = [dict(vars(c)) for c in classes], sorted(ALL_ATTENTION_FUNCTIONS.keys()), "torchvision" in sys.modules
print(before == after)
"""
    assert run(code) == "True"


def test_importing_loads_nothing_large() -> None:
    """Public names are loaded when they are used; type checkers read them in a block of their own, which says the same."""
    loaded = "[name for name in ('torch', 'transformers', 'numpy', 'typer', 'gradio') if name in sys.modules]"
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


def test_files_do_not_replace_the_functions_that_they_are_called_as() -> None:
    """Whatever is imported first, in a package that has loaded nothing yet."""
    code = """
import importlib, inspect, sys
for first in ("duet_vlm.attach", "duet_vlm.methods.fastv", "duet_vlm.cli.main", "duet_vlm"):
    for known in [known for known in sys.modules if known.split(".")[0] == "duet_vlm"]:
        del sys.modules[known]
    importlib.import_module(first)
    import duet_vlm
    from duet_vlm import attach, methods
    print(all(map(inspect.isfunction, (attach, methods, duet_vlm.attach, duet_vlm.methods))), attach is duet_vlm.attach, len(methods()) > 9)
"""
    assert forked(code).splitlines() == 4 * ["True True True"]


def test_files_can_be_imported_in_any_order() -> None:
    """Nothing can stand in the way where there is no circle (above); here from the first to the last and back, for what only loading shows."""
    names = sorted(FILES)
    code = f"""
import importlib, sys, torch, transformers
for order in ({names}, {names[::-1]}):
    for known in [known for known in sys.modules if known.split(".")[0] == "duet_vlm"]:
        del sys.modules[known]
    for name in order:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name.split(".")[0] not in ("lmms_eval", "peft", "accelerate", "yaml", "matplotlib", "scipy", "gradio"):
                print(name, error)
        except ImportError as error:
            print(name, error)
"""
    assert forked(code) == ""


def test_what_decides_needs_no_transformers() -> None:
    """Methods, arithmetic and what a server needs of them load beside any transformers, or none: vLLM holds on to older ones."""
    pure = {"budget", "memory", "methods", "ops", "parts", "presets", "reducer", "registry", "serve", "settings", "spelling", "stages", "tokens"}
    files = {"text", "tower", "models.adapter", "models.llava", "models.towers", "flow.choose", "flow.rules", "flow.split", "flow.verify", "cli.main"}
    names = sorted(name for name in FILES if room_of(name) in pure or name.removeprefix("duet_vlm.") in files)
    code = f"import importlib, sys; sys.modules['transformers'] = None; [importlib.import_module(name) for name in {names}]; import duet_vlm; "
    assert len(names) > 40 and run(code + "print(duet_vlm.get_method('duet')(dominant=2).plan(9, 4, None).entry)") == "2"


def test_torchvision_is_never_imported() -> None:
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torchvision" for name in names), path


def test_public_names_exist() -> None:
    assert sorted(duet_vlm.__all__) == sorted(set(duet_vlm.__all__))
    assert all(hasattr(duet_vlm, name) for name in duet_vlm.__all__)
