"""A prompt through the decoder layers: entry, drop stages, masks, positions."""
