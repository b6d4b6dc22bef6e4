"""Text and images in and out of a model: prompts, tokenizer, image files, PNG files, the web."""
