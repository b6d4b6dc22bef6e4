"""A loaded model that generates text and images, with its weights, prompts and thread."""
