"""HTTP over one model: OpenAI's routes for answers and pictures, and a page to play in."""
