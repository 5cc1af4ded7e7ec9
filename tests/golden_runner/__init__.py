"""Runs recorded cases of the released codes against this library; one file per kind of case."""
