"""Configs, processors and starting weights of the embedded models."""
