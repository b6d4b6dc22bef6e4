"""Many requests over one model: a scheduler for answers, one for images, one thread."""
