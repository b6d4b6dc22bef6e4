"""HTTP in front of the engine: OpenAI's routes for answers and images, and a web page."""
