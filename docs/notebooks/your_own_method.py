# %% [markdown]
# # Write your own method
#
# A method is one frozen dataclass. It is given scores and says which tokens stay; masks, positions, caches, labels and
# reports follow by themselves. This one drops once, in the middle of the decoder: the tokens that the question attends
# to most stay, and every fourth place of the picture is kept whatever its score.

# %%
from dataclasses import dataclass

import torch

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import layer_counts, target_mean


@duet_vlm.register("grid_and_text")
@dataclass(frozen=True)
class GridAndText(duet_vlm.DecoderReducer):
    """What text attends to, and a coarse grid of the rest. Cost: one key projection and the text's queries."""

    paper = "an example"
    summary = "one drop by text attention that keeps a coarse grid"
    requires = frozenset({duet_vlm.Input.SCORES, duet_vlm.Input.TOKENS})  # what the view holds

    keep: float = 0.4
    step: int = 4

    def plan(self, tokens, depth, budget):
        # all tokens up to the middle, a share of them from there on: the budget decides which
        share = self.keep if budget is None else max(0.0, 2 * target_mean(budget, tokens) / tokens - 1)
        return duet_vlm.SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, ((depth // 2, min(share, 1.0)),)))

    def prune_tokens(self, view: duet_vlm.DecoderView) -> torch.Tensor:
        on_grid = view.require(duet_vlm.Input.TOKENS)[1] % self.step == 0
        return top(view.require(duet_vlm.Input.SCORES) + 0.01 * on_grid, view.valid, view.num_keep)


# %% [markdown]
# It is a method like any other now: by name, under a budget, in compositions, in the report.

# %%
model, processor = tiny.load()
sample = tiny.samples("test", 1)[0]
inputs = processor(images=sample.image, text=tiny.prompt(sample.question), return_tensors="pt")
with duet_vlm.attach(model, "grid_and_text", budget=0.7) as handle:
    written = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    print(sample.question, "->", processor.decode(written, skip_special_tokens=True), "| expected", sample.answer)
    print(handle.report().measured)
    ((span,),) = handle.trace
    print(len(span.stages[-1].kept), "tokens behind the drop")

# %% [markdown]
# What it returns is checked: a method that keeps too many is told so by name.


# %%
@duet_vlm.register("greedy_guest")
@dataclass(frozen=True)
class GreedyGuest(GridAndText):
    """Keeps everything, whatever it was asked for."""

    def prune_tokens(self, view):
        return view.valid


try:
    with duet_vlm.attach(model, "greedy_guest", budget=0.7):
        model.generate(**inputs, max_new_tokens=8)
except ValueError as error:
    print(error)
