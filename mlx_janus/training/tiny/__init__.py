"""The recipe of Janus-Tiny, one file per stage or part."""
