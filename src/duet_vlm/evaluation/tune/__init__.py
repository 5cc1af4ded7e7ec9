"""Search of a method and a budget for a model and a set of questions: the work behind ``duet-vlm tune``."""

# what is searched unless told otherwise
METHODS = ("duet", "duet_plus", "duet_plus[options.reentry=layer]", "scope", "visionzip", "pyramiddrop", "fastv")
BUDGETS = (0.75, 0.5, 0.33, 0.22, 0.11, 0.06)
