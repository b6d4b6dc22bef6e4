"""The recipe of Janus-Tiny, stage by stage."""
