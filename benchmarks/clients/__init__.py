"""Clients of OpenAI's API, each run against the server: one script a client."""
