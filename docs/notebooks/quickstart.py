# %% [markdown]
# # Quickstart
#
# The model that ships in the package, one of its pictures, and a third of the visual tokens. Nothing is downloaded.

# %%
import duet_vlm
from duet_vlm.evaluation import tiny

model, processor = tiny.load()
shown = tiny.demo_images()[0]
question, expected = shown.questions[0]
inputs = processor(images=shown.image, text=tiny.prompt(question), return_tensors="pt")


def answer():
    written = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(written, skip_special_tokens=True)


print(question, "expected:", expected)

# %% [markdown]
# The full model, and the same model with DUET-VLM attached. A budget is the mean number of visual tokens per decoder
# layer, as a count or a fraction.

# %%
full = answer()
with duet_vlm.attach(model, "duet", budget=0.33) as handle:
    reduced = answer()
    report = handle.report()
print("full:", full, "| reduced:", reduced)
print(report)

# %% [markdown]
# Where the tokens went: what entered the decoder, and what each later stage kept.

# %%
with duet_vlm.attach(model, "duet", budget=0.33) as handle:
    answer()
    ((span,),) = handle.trace  # one sample, one picture
print(f"{sum(map(len, span.merged.values()))} tokens were merged into {len(span.merged)} of the rows that entered")
for stage in span.stages:
    print(f"layer {stage.layer}: {len(stage.kept)} kept, {len(stage.dropped)} dropped")

# %% [markdown]
# Outside of `with` the model is what it was, bit for bit.

# %%
assert answer() == full
