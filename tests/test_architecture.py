"""The architecture as the files draw it: packages from the ground up, names that a stranger can read, and imports
without side effects."""

from __future__ import annotations

import ast
import contextlib
import io
import multiprocessing
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import duet_vlm

ROOT = Path(duet_vlm.__file__).parent
REPOSITORY = ROOT.parent.parent

# From the ground up: a package imports from those before it, and from no other. This is the picture of the library.
ORDER = (
    "utils",  # removable hooks, types of fields, near names
    "planning",  # budget -> counts: exact integers; spans, selections
    "ops",  # scores, selectors, mergers: functions of tensors
    "inputs",  # pictures, videos, words of the question
    "reducers",  # the contracts of methods, and what they receive
    "profiling",  # FLOPs and bytes, predicted and counted; timing in pairs
    "models",  # one adapter for each family
    "runtime",  # what an attached model does: encode, prefill, decode
    "methods",  # one file for each method
    "api",  # attach, handle, load, save, calibrate
    "viz",
    "serve",
    "train",
    "evaluation",
    "app",
    "cli",
)
# And of those before it, not these: methods decide and the runtime acts; neither knows the other, nor a family.
FORBIDDEN = {
    "methods": {"runtime", "models", "profiling"},
    "models": {"reducers"},
    "profiling": {"inputs"},
    "runtime": {"profiling"},
}
APPLICATIONS = ORDER[ORDER.index("viz") :]  # these see the library as anyone outside does
PRIVATE = {"runtime", "ops", "methods"}  # what applications have no business with; a server chooses rows by them

FILES = {
    ".".join(("duet_vlm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
SOURCES = sorted(
    [*FILES.values(), *(REPOSITORY / "lab/src").rglob("*.py"), *(REPOSITORY / "plugins/vllm/src").rglob("*.py")]
)


def package_of(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def file_of(name: str) -> str:
    """The file that an imported name comes from: a module's own, or that of the package which defines it."""
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


def imports(name: str) -> list[tuple[str, int]]:
    """(file, line) of every import of the package in a file: at the top, in a function, for types only."""
    found = []
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno}: write the whole name of the module"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
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


# ---- packages


def test_the_top_level_is_the_picture() -> None:
    """A new module at the top level needs a place in the order; at most sixteen packages stand there."""
    found = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert found - {"__init__", "__main__", "__pycache__"} == set(ORDER) and len(ORDER) <= 16


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down(name: str) -> None:
    package = package_of(name)
    if name in ("duet_vlm", "duet_vlm.__main__"):
        return
    below = set(ORDER[: ORDER.index(package) + 1]) - FORBIDDEN.get(package, set())
    if package in APPLICATIONS:
        below = (below | {"duet_vlm"}) - (set() if package == "serve" else PRIVATE)
    below |= {"duet_vlm"} if package == "api" else set()
    assert not [f"{name}:{line} imports {target}" for target, line in imports(name) if package_of(target) not in below]


# of a prompt; what they hand on is in ``runtime/prompt.py`` and ``runtime/context.py``
STAGES = ("encode", "prefill", "decode")


@pytest.mark.parametrize("stage", STAGES)
def test_stages_of_a_prompt_do_not_import_each_other(stage: str) -> None:
    here = [name for name in FILES if name.startswith(f"duet_vlm.runtime.{stage}.")]
    others = tuple(f"duet_vlm.runtime.{other}." for other in STAGES if other != stage)
    assert here and not [
        f"{name}:{line} imports {target}"
        for name in here
        for target, line in imports(name)
        if target.startswith(others)
    ]


def test_no_circle_between_files() -> None:
    assert not circle({name: {target for target, _ in imports(name)} - {name} for name in FILES if name != "duet_vlm"})


def test_the_circle_finder_finds_circles() -> None:
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]


RULED = [name for name in FILES if package_of(name) in ("runtime", "profiling") or name == "duet_vlm.api.handle"]


@pytest.mark.parametrize("name", RULED)
def test_no_branches_on_concrete_methods_or_models(name: str) -> None:
    words = {"llava", "qwen", "duet", "fastv", "visionzip", "pyramiddrop"}
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Compare):
            literals = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            assert not any(word in text.lower() for text in literals for word in words), f"{name}:{node.lineno}"


# ---- names and words

# end like participles or pronouns, and are nouns
NOUNS = {"Handle", "Span", "Selection", "Report", "Loader", "Reducer"}
BARE = re.compile(
    r"_?(?:[A-Z][a-z]*(?:ed|ing)|Made|Left|Seen|Shown|Said|Chosen|Kept|Known|Apart|Inside|Words|Walk|Wrong|Note|Notes)"
)
RIDDLE = re.compile(r"(What|Which|Who|Whose|Whether|How|Where|Why)\b")


ONE_PER_FAMILY = {"Processor"}  # of the plug-in: each registers its own beside a model


def classes() -> list[tuple[str, str]]:
    return [
        (node.name, f"{path.relative_to(REPOSITORY)}:{node.lineno}")
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]


def test_classes_have_nouns_for_names() -> None:
    """No class is a bare participle, adjective or pronoun: ``Encoded``, ``Left``, ``Choosing``."""
    assert not [f"{where}: {name}" for name, where in classes() if BARE.fullmatch(name) and name not in NOUNS]
    assert all(BARE.fullmatch(name) for name in ("Encoded", "_Choosing", "Left", "Made")) and not BARE.fullmatch(
        "SpanPlan"
    )


def test_no_two_classes_have_one_name() -> None:
    counts = Counter(name for name, _ in classes())
    assert not [(name, where) for name, where in classes() if counts[name] > 1 and name not in ONE_PER_FAMILY]


def test_docstrings_say_what_a_thing_is_or_does() -> None:
    """None begins with a question word."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    assert not [name for node in nodes if RIDDLE.match(name := ast.get_docstring(node) or "")]


LISTED = re.compile(r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", re.S | re.M)
ENTRY = re.compile(r"^(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*)(?: : |$| \[)", re.M)


def listed_names(docstring: str) -> list[str]:
    """Names that a NumPy docstring lists as parameters or attributes."""
    entries = [entry for section in LISTED.findall(docstring) for entry in ENTRY.findall(section)]
    return [name.strip("* ") for entry in entries for name in entry.split(",")]


def arguments(function: ast.FunctionDef) -> set[str]:
    given = function.args
    several = [given.vararg, given.kwarg]
    return {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, several))}


def members(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> set[str]:
    """Fields, methods, attributes set on ``self`` and arguments of ``__init__``, with those of base classes of the
    package."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            found |= {part.name} | (arguments(part) if part.name == "__init__" else set())
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in ("self", "cls"):
            found.add(part.attr)
    bases = [base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases]
    return found.union(*(members(known[base], known) for base in bases if base in known and base != node.name))


def unknown_names(sources: list[str]) -> list[str]:
    nodes = [
        node
        for text in sources
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    ]
    known = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    has = {
        node: members(node, known) if isinstance(node, ast.ClassDef) else arguments(node)
        for node in nodes
        if ast.get_docstring(node)
    }
    return [
        f"{node.name}: {name}"
        for node in has
        for name in listed_names(ast.get_docstring(node) or "")
        if name not in has[node]
    ]


def test_docstrings_list_names_that_exist() -> None:
    """Parameters, attributes and fields."""
    assert unknown_names([path.read_text() for path in SOURCES]) == []


def test_the_finder_of_unknown_names_finds_them() -> None:
    section = "Parameters\n    ----------\n    a, b : int\n        Two numbers.\n    **rest\n        Others.\n"
    function = f'def f(a, **rest):\n    """Add.\n\n    {section}    """'
    sub = '    """Have them.\n\n    Attributes\n    ----------\n    x : int\n    y : int\n    """'
    assert unknown_names([function, "class A:\n    x: int", f"class B(A):\n{sub}"]) == ["f: b", "B: y"]


# ---- imports without side effects


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def forked(code: str) -> str:
    """The same in a copy of this process, which has torch and transformers loaded already."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_executed, (code,))


def _executed(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {})
    return output.getvalue().strip()


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
    said = {
        name.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert said == {name: f"duet_vlm.{home}" for name, home in duet_vlm._HOMES.items()}
    assert sorted(said) == duet_vlm.__all__ and set(duet_vlm.__all__) <= set(dir(duet_vlm))
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        duet_vlm.atach  # noqa: B018
    with pytest.raises(ImportError, match="atach"):
        from duet_vlm import atach  # type: ignore[attr-defined]  # noqa: F401


def test_files_can_be_imported_in_any_order() -> None:
    """Nothing can stand in the way where there is no circle (above); here from the first to the last and back, for what
    only loading shows."""
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
    """Methods, arithmetic and what a server needs of them load beside any transformers, or none: vLLM holds on to older
    ones."""
    pure = {"utils", "planning", "ops", "reducers", "methods", "serve"}
    files = {
        "inputs.text_queries", "models.adapter", "models.llava", "models.tower_signals", "runtime.encode.selection", "runtime.active_config",
        "runtime.encode.per_crop", "runtime.validation", "api.presets", "cli.main",
    }  # fmt: skip
    names = sorted(name for name in FILES if package_of(name) in pure or name.removeprefix("duet_vlm.") in files)
    code = f"import importlib, sys; sys.modules['transformers'] = None; [importlib.import_module(name) for name in {names}]; import duet_vlm; "
    assert (
        len(names) > 40 and run(code + "print(duet_vlm.get_method('duet')(dominant=2).plan(9, 4, None).entry)") == "2"
    )


def test_torchvision_is_never_imported() -> None:
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(name.split(".")[0] == "torchvision" for name in names), path


def test_public_names_exist() -> None:
    assert sorted(duet_vlm.__all__) == sorted(set(duet_vlm.__all__))
    assert all(hasattr(duet_vlm, name) for name in duet_vlm.__all__)
