"""The networks: each part one file, attributes named as in the checkpoint. Nothing of files, prompts or commands."""
