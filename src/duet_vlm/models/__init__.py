"""One file per model family: its parts, the positions it uses, the making of queries and keys. Add a file to add a
family."""
