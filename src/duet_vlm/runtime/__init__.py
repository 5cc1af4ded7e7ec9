"""The forward path, one file per step.

The flow acts on decisions; it never asks which method or which model it serves.
"""
