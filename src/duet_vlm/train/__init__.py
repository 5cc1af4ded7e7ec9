"""Training with reduction: transformers' own Trainer, fewer tokens. ``duet-vlm train`` is its shell."""
