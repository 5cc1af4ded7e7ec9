"""The home page of the site: what this is, and where to go from here."""

from __future__ import annotations

import re

from links import ROOT

PAGE = "index.md"
FIRST = """```bash
pip install -e ".[eval]"   # in a clone
duet-vlm demo              # an embedded model; nothing is downloaded
```"""
CARDS: dict[str, tuple[str, dict[str, str]]] = {  # I want to ... -> in a sentence, and label -> page
    "try it": (
        "Five minutes with an embedded model, then with yours.",
        {"Quickstart": "quickstart.md", "in the browser": "app.md"},
    ),
    "choose a method and a budget": (
        "Let your model and your questions decide, or start from what was measured.",
        {"Method and budget": "choose.md", "drop curve": "drop-curve.md", "tokens that come back": "reentry.md"},
    ),
    "see what is lost": (
        "Every method at equal numbers of tokens, with intervals.",
        {"Who keeps what": "comparison.md", "all results": "results.md", "on your data": "evaluate.md"},
    ),
    "serve a faster model": (
        "vLLM, the server of transformers, many prompts at once.",
        {"Serve": "serve.md", "many prompts": "evaluate.md#many-prompts", "families": "families.md"},
    ),
    "ask about clips": (
        "Frames that repeat need no tokens of their own, and the tower can read less, too.",
        {
            "Video": "video.md",
            "clips from files": "video.md#clips-from-files",
            "in the tower": "reduce-in-the-tower.md",
        },
    ),
    "train with fewer tokens": (
        "Stock trainers, adapters, and modules that learn to compress.",
        {"Train": "train-with-reduction.md", "trained compressors": "trained-compressors.md"},
    ),
    "look a method up": (
        "A page for each: a picture, how to try it, settings, idea, numbers.",
        {"Catalogue": "catalogue/index.md", "spending a budget": "methods.md", "papers": "../PAPERS.md"},
    ),
    "write a method": (
        "One file; tests, command line and reports find it by themselves.",
        {"Add a method": "../CONTRIBUTING.md#add-a-method-one-file", "how it works": "how-it-works.md"},
    ),
    "know the limits": (
        "What is refused, what goes wrong, and what to do then.",
        {"Questions and trouble": "faq.md", "works with": "families.md#works-with"},
    ),
}


def page() -> str:
    """Headline, cards, a picture and a first command."""
    cards = []
    for wish, (words, pages) in CARDS.items():
        links = " · ".join(f"[{label}]({link})" for label, link in pages.items())
        cards.append(f"-   **... {wish}**\n\n    {words}\n\n    {links}")
    return "\n\n".join([
        "---\nhide: [navigation, toc]\n---",
        "# duet-vlm",
        "Make the vision-language model you use faster: fewer visual tokens, same weights, one call to attach, one to "
        "undo.",
        headline(),
        "## I want to ...",
        '<div class="grid cards" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>",
        "## In one picture",
        "![Four views of one image: all tokens, then the tokens that DUET keeps, merges and drops](images/kept.png)",
        FIRST,
    ]) + "\n"  # fmt: skip


def headline() -> str:
    """README's own, which a generator writes from result files.

    Raises
    ------
    ValueError
        README has none between its marks.
    """
    block = r"<!-- table:headline -->\n(.*?)\n<!-- /table:headline -->"
    found = re.search(block, (ROOT / "README.md").read_text(), flags=re.S)
    if found is None:
        raise ValueError("README.md has no block <!-- table:headline -->, which the home page of the site shows")
    return found[1]
