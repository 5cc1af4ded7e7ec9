# %% [markdown]
# # Train with reduction
#
# Attach, then train as always: labels are gathered for the rows that are left, gradients flow through kept and merged
# rows. A few steps on drawn pictures, to see the parts; `duet-vlm train --recipe tiny` is the whole run.

# %%
import tempfile

import torch

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.train.collate import Collator
from duet_vlm.train.data import conversations

torch.manual_seed(0)
model, processor = tiny.load()
data = conversations(["tiny-crowded"], limit=32)
collate = Collator(processor)
batch = collate([data[0], data[1]])
print({name: tuple(value.shape) for name, value in batch.items()})

# %% [markdown]
# Eight steps at 5 % of the tokens. The loss is that of the same labels as without reduction.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
with duet_vlm.attach(model.train(), "duet", budget=0.05) as handle:
    duet_vlm.save_to_config(handle)  # goes into config.json with the weights
    for step in range(8):
        loss = model(**collate([data[4 * step + i] for i in range(4)])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(step, f"{loss.item():.3f}")

# %% [markdown]
# The checkpoint remembers how it was trained: `attach` without a method uses that.

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
print(duet_vlm.load_from_config(again))
with duet_vlm.attach(again.eval()) as handle:
    print(handle.reducer.name, handle.budget)
