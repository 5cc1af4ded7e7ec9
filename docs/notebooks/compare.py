# %% [markdown]
# # Compare methods
#
# The same questions to the full model and to several methods at one budget. `duet-vlm eval` does this with intervals,
# tests and plots; here it is by hand, to see what happens.

# %%
import duet_vlm
from duet_vlm.evaluation import tiny

model, processor = tiny.load()
samples = tiny.samples("test", 16)
print(samples[0].question, "->", samples[0].answer)

# %% [markdown]
# Share of right answers, and visual tokens per layer as the report measured them.


# %%
def right():
    found = 0
    for sample in samples:
        inputs = processor(images=sample.image, text=tiny.prompt(sample.question), return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        found += processor.decode(written, skip_special_tokens=True) == sample.answer
    return found / len(samples)


rows = [("full model", right(), 256.0)]
for method in ("duet", "scope", "fastv", "random"):
    with duet_vlm.attach(model, method, budget=0.22) as handle:
        rows.append((method, right(), handle.report().measured_mean))
for name, share, tokens in rows:
    print(f"{name:12} {share:6.1%} right at {tokens:6.1f} tokens")

# %% [markdown]
# `random` is what any method has to beat. Sixteen questions tell little: take hundreds, and look at intervals
# (`duet-vlm eval --limit 500`, then `duet-vlm report`).

# %% [markdown]
# Methods compose: one in front of the decoder with another one's drops inside it, under one budget.

# %%
with duet_vlm.attach(model, "scope+duet", budget=0.11) as handle:
    print("scope+duet", f"{right():.1%} at {handle.report().measured_mean:.1f} tokens")
    print(handle.plan(256))
