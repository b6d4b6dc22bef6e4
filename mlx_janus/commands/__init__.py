"""The commands, one file each, and their shared parts. Only this folder uses click."""
