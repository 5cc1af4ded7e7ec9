"""The part of a method that an engine which owns model and scheduler (vLLM) runs: settings, counts, rows, stages. No
engine is imported."""
