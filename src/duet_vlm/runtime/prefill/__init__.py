"""A prompt through the decoder layers: entry, drop stages, positions."""
