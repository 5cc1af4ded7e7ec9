"""Small models, generated tasks, training recipes and reference methods that the comparison of duet-vlm rests on."""
