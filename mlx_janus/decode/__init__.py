"""The decode loops: logits to tokens, for text and for images. They open no files."""
