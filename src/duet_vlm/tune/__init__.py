"""Which method and budget for a model and a set of questions: the search behind ``duet-vlm tune``."""
