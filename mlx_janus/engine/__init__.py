"""Many requests on one model or several: for each, two schedulers (text, images) and a thread."""
