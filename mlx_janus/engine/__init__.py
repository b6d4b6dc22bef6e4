"""Many requests on one model: a text scheduler, an image scheduler and one thread."""
