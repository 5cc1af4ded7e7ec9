"""References: nothing, random, evenly spaced."""
