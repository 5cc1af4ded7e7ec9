"""Reference methods of the comparison, and a method of building blocks."""
