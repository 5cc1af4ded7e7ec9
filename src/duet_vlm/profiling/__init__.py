"""Tokens, FLOPs and bytes, predicted and counted by the same functions everywhere; timing in pairs."""
