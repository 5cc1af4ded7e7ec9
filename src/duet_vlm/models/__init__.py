"""One file = one model family: where the parts are, which positions they use, how queries and keys are made. Add a file to add a family."""
