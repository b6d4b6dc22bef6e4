"""One model at work: its weights, prompts and thread, and how it answers and draws."""
