"""Methods that reduce before the decoder and inside it."""
