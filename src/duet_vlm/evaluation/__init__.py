"""Accuracy against budget: experiments, their results, and what they say."""
