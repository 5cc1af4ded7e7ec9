"""The first stage of a method for an engine that owns model and scheduler (vLLM): settings, counts, tokens. No engine
is imported."""
