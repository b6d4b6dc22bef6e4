"""``/v1/messages``, Anthropic's Messages API: answers to conversations with images."""
