"""Later calls on the cache of a reduced prompt (``runtime/pruned_cache.py``): a step, or the next turn."""
