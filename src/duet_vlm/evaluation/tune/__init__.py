"""Search of a method and a budget for a model and a set of questions: the work behind ``duet-vlm tune``."""

METHODS = ("duet", "duet_plus", "scope", "visionzip", "pyramiddrop", "fastv")  # what is searched unless told otherwise
BUDGETS = (0.75, 0.5, 0.33, 0.22, 0.11, 0.06)
