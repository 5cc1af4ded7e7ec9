"""``tiny-page`` goes on from ``tiny-chain``: projector, newline and decoder learn to read pages, from answers alone.

The tower stays as it is. No attention targets, probes or hidden tokens; the lessons are questions, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from duet_vlm.evaluation.tiny.network import FEATURE_LAYER, WIDTH
from duet_vlm.evaluation.tiny.questions import PLURALS, SceneQuestion
from duet_vlm.evaluation.tiny.scenes import SHAPES
from duet_vlm_lab.generators.page_questions import KINDS, PageAsker
from duet_vlm_lab.generators.page_scenes import (
    NEWLINES,
    OVERVIEW,
    QUARTERS,
    ROWS,
    ScenePage,
    packed_rows,
    page,
    render_page,
)
from duet_vlm_lab.networks.chain_network import DISTINCT, TURNS
from duet_vlm_lab.networks.page_network import PAGE_TOKEN, build_page_processor, start_from_chain
from duet_vlm_lab.recipe.chain import draw_kinds
from duet_vlm_lab.recipe.chain_packing import PackedChains, answer_loss, decode, pack
from duet_vlm_lab.recipe.optim import optimizers
from duet_vlm_lab.recipe.packing import choose_patches, lesson
from duet_vlm_lab.recipe.stages import Stage

LESSONS = ("quarter", "cell", "at", "land1", "land2", "tally")
QUESTIONS = 24  # of a page in a step
FEW = (128, 192, 256)  # rows of the crops on shortened pages
WARM, FALL = 50, 600  # steps of the learning rate's rise and of its fall at the end


@dataclass(frozen=True)
class PagePart:
    """A part of the curriculum, up to step ``until``: so many pages a step, shortened or ``whole``; weighted kinds."""

    until: int
    pages: int
    whole: bool
    kinds: dict[str, float]


SEEK = {
    "attribute": 0.4, "existence": 0.4, "read_digit": 0.7, "read_word": 0.7, "count": 1.0, "hop1": 1.5, "hop2": 1.5, "quarter": 1.5, "cell": 0.5,
    "at": 2.0, "land1": 0.7, "land2": 0.7,
}  # fmt: skip
READ = {
    "attribute": 0.6, "existence": 0.6, "read_digit": 1.0, "read_word": 1.0, "count": 2.0, "hop1": 2.0, "hop2": 2.0, "quarter": 0.5, "cell": 0.2,
    "at": 0.7, "land1": 0.2, "land2": 0.2,
}  # fmt: skip
BEHIND = {  # what was behind the rest
    "attribute": 0.3, "existence": 0.3, "read_digit": 0.5, "read_word": 0.7, "count": 0.4, "hop1": 2.5, "hop2": 3.0, "quarter": 1.7, "cell": 0.1,
    "at": 0.5, "land1": 0.1, "land2": 0.2, "tally": 2.0,
}  # fmt: skip
PARTS = (PagePart(1200, 4, False, SEEK), PagePart(1600, 2, True, READ), PagePart(10**9, 2, True, BEHIND))


class PageTeacher(PageAsker):
    """The questions of one page, and the lessons: in which quarter and cell a thing is, what is there, where moves
    lead, and how many there are of other shapes, since a page offers a single question that counts."""

    def quarter_of(self) -> SceneQuestion:
        i = self.pick(self.unique)
        return SceneQuestion(
            f"{self.name(i)[0].capitalize()}: what quarter?", str(self.quarter[i] + 1), "quarter", (i,), False, ()
        )

    def cell(self) -> SceneQuestion:
        i = self.pick(self.unique)
        return SceneQuestion(
            f"{SHAPES[self.things[i].shape].capitalize()}: what cell?",
            self.readable(i, "cell") or "",
            "cell",
            (i,),
            False,
            (),
        )

    def at(self) -> SceneQuestion:
        i = self.pick([i for i, thing in enumerate(self.things) if thing.tag])
        text = f"Quarter {self.quarter[i] + 1}, {self.readable(i, 'cell')}: what tag?"
        return SceneQuestion(text, self.readable(i, "tag") or "", "at", (i,), True, ())

    def tally(self) -> SceneQuestion:
        shapes = [thing.shape for thing in self.things]
        count = [shapes.count(shape) for shape in range(len(SHAPES))]
        drawn = int(self.rng.integers(5))
        wanted = (drawn,) if drawn < 2 else (2, 3, 4)
        shape = self.pick([shape for shape, many in enumerate(count) if many in wanted])
        seen = tuple(i for i, other in enumerate(shapes) if other == shape)
        return SceneQuestion(f"How many {PLURALS[shape]} are there?", str(count[shape]), "tally", seen, False, ())

    def land(self, hops: int) -> SceneQuestion | None:
        found = self.chain(hops, "cell")
        return found and SceneQuestion(found.text, found.answer, f"land{hops}", found.needed, False, ())

    def asked(self, kind: str) -> SceneQuestion:
        """A question of a kind; where the page offers none, an "attribute" instead."""
        found = {"quarter": self.quarter_of, "land1": lambda: self.land(1), "land2": lambda: self.land(2)}.get(kind)
        return (found or getattr(self, kind))() or self.attribute()


def sources() -> Tensor:
    """Number of the patch of overview and crops that each packed row shows, (1312,); one more than the last where it is
    a newline."""
    found = np.full(ROWS, OVERVIEW * (1 + QUARTERS))
    for first, rows in enumerate((np.arange(OVERVIEW), *map(packed_rows, range(QUARTERS)))):
        found[rows] = first * OVERVIEW + np.arange(OVERVIEW)
    return torch.from_numpy(found)


class PageStage(Stage):
    """Everything but the tower, on shortened pages first and then on whole ones; ``pages`` of them, round and round."""

    def __init__(self, seed: int, steps: int, bf16: bool, pages: int = 2000) -> None:
        super().__init__(seed, steps, bf16)
        self.pages = pages
        self.core = start_from_chain(DISTINCT).model
        self.core.vision_tower.requires_grad_(False)
        self.reader, self.sources = build_page_processor().image_processor, sources()
        self.known: dict[tuple[str, int], tuple[ScenePage, Tensor]] = {}

    @torch.no_grad()
    def page(self, split: str, index: int) -> tuple[ScenePage, Tensor]:
        """A page and what the tower sees of it, (1280, WIDTH); kept in memory."""
        if (split, index) not in self.known:
            drawn = page(split, self.seed, index)
            pixels = self.reader(images=[Image.fromarray(render_page(drawn))], return_tensors="pt").pixel_values[0]
            with self.autocast():
                seen = self.core.vision_tower(pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:]
            self.known[split, index] = drawn, seen.flatten(0, 1).half()
        return self.known[split, index]

    def batch(self, step: int) -> dict[str, Any]:
        part, rng = next(part for part in PARTS if step < part.until), np.random.default_rng([self.seed, 41, step])
        items = [self.page("train", (4 * step + i) % self.pages) for i in range(part.pages)]
        return self.packed(
            items,
            [draw_kinds(part.kinds, QUESTIONS, rng) for _ in items],
            None if part.whole else int(rng.choice(FEW)),
            rng,
        )

    def packed(
        self, items: list[tuple[ScenePage, Tensor]], kinds: list[list[str]], keep: int | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        asked = [
            [PageTeacher(drawn, rng).asked(kind) for kind in mine]
            for (drawn, _), mine in zip(items, kinds, strict=True)
        ]
        rows = (
            np.tile(np.arange(ROWS), (len(items), 1))
            if keep is None
            else np.stack([chosen(drawn, keep, rng) for drawn, _ in items])
        )
        seen = torch.stack([seen for _, seen in items])
        return {
            "asked": asked,
            "seen": seen,
            "rows": torch.from_numpy(rows),
            "packed": pack(asked, rows, ROWS, PAGE_TOKEN),
        }

    def answers(
        self, asked: list[list[SceneQuestion]], seen: Tensor, rows: Tensor, packed: PackedChains
    ) -> tuple[Tensor, Tensor]:
        """Loss and hits."""
        with self.autocast():
            return answer_loss(
                self.core.language_model,
                decode(self.core.language_model, self.visual(seen, rows), packed, TURNS),
                packed,
            )

    def visual(self, seen: Tensor, rows: Tensor) -> Tensor:
        """Visual tokens of the decoder, (B, K, WIDTH)."""
        patches = self.core.multi_modal_projector(seen.float())
        newline = self.core.image_newline.to(patches.dtype).expand(len(seen), 1, WIDTH)
        return torch.cat([patches, newline], 1)[torch.arange(len(seen))[:, None], self.sources[rows]]

    def forward(self, **batch: Any) -> dict[str, Any]:
        loss, hits = self.answers(**batch)
        return {"loss": loss, "tokens": batch["rows"].shape[1], **by_kind(list(hits), batch["asked"])}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        learning = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return optimizers(learning, matrix=0.004, query_key=0.002, embedding=5e-4, rest=1e-3)

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / WARM, max(0.02, (self.steps - step) / min(FALL, self.steps)))

    @torch.no_grad()
    def validate(self, pages: int = 12) -> dict[str, float]:
        """Accuracy per kind on whole validation pages."""
        hits, asked = [], []
        for index in range(pages):
            item = self.page("validation", index)
            made = self.packed([item], [[*4 * KINDS, *LESSONS]], None, item[0].generator(2))
            hits += list(self.answers(**made)[1])
            asked += made["asked"]
        return by_kind(hits, asked)


def chosen(drawn: ScenePage, keep: int, rng: np.random.Generator) -> np.ndarray:
    """Packed rows in order: ``keep`` of the crops, enough for every question, an eighth as many of the overview, and
    the newlines."""
    crops = [
        packed_rows(n)[choose_patches(lesson(quarter, []), keep // QUARTERS, rng)]
        for n, quarter in enumerate(drawn.quarters)
    ]
    return np.sort(np.concatenate([rng.permutation(OVERVIEW)[: keep // 8], *crops, NEWLINES]))


def by_kind(hits: list[Tensor], asked: list[list[SceneQuestion]]) -> dict[str, float]:
    """Share of right answers per kind; ``all``: the mean of the task's kinds."""
    found: dict[str, list[float]] = {kind: [] for kind in (*KINDS, *LESSONS)}
    for row, mine in zip(hits, asked, strict=True):
        for hit, one in zip(row.tolist(), mine, strict=True):
            found[one.kind].append(hit)
    out = {kind: round(float(np.mean(v)), 3) for kind, v in found.items() if v}
    return {"all": round(float(np.mean([out[kind] for kind in KINDS if kind in out])), 3), **out}
