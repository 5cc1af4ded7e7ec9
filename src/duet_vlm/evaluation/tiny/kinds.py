"""Kinds of question about a scene; apart from the generator, which loads numpy."""

KINDS = ("attribute", "existence", "read_digit", "read_word", "count", "spatial", "compare")
