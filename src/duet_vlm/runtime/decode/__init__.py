"""The cache of a reduced prompt, and later steps on it."""
