"""Words and pictures on their way in and out: prompts, tokenizer, images, the web."""
