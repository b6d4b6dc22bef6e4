"""``/v1/responses``, OpenAI's Responses API: an answer, a call of a function, or an image."""
