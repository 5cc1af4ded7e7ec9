"""Tokens, FLOPs, bytes and time: predicted and measured by the same functions everywhere."""
