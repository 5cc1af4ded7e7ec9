"""Paired measurements of a model against itself: the full model, methods and floors in turns, stage by stage."""
