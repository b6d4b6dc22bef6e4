"""The decode loops: logits to tokens, for words and for pictures. Nothing of files."""
