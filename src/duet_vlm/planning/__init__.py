"""Budgets to counts: exact integer arithmetic, no tensors."""
