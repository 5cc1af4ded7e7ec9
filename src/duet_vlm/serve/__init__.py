"""What an engine that owns model and scheduler (vLLM) needs to run the first stage of a method: settings, counts, rows. No engine is imported."""
