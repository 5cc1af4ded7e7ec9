# %% [markdown]
# # Video
#
# A second embedded model reads clips of eight frames, 520 visual tokens. Its questions need several frames: where
# something moves, what came first.

# %%
import duet_vlm
from duet_vlm_lab.tasks import video

model, processor = video.load()
clip = video.sample("test", 3)
inputs = processor(videos=clip.frames, text=video.prompt(clip.question), return_tensors="pt")


def answer():
    written = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(written, skip_special_tokens=True)


print(clip.question, "expected:", clip.answer, "| full model:", answer())

# %% [markdown]
# Frame by frame, by what changed between frames, and both under one budget.

# %%
for method in ("duet", "frames", "frames+duet"):
    with duet_vlm.attach(model, method, budget=0.2) as handle:
        said, report = answer(), handle.report()
        print(f"{method:12} {said:8} {report.measured_mean:6.1f} of {report.tokens} tokens per layer")

# %% [markdown]
# Which frames the kept tokens are from: each frame has 65 rows (CLS and 64 patches).

# %%
with duet_vlm.attach(model, "frames", budget=0.2) as handle:
    answer()
    ((span,),) = handle.trace
kept = span.stages[0].kept
print([sum(frame * 65 <= token < (frame + 1) * 65 for token in kept) for frame in range(8)])
