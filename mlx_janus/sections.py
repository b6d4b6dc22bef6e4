"""How a section of a config is checked, read and written."""
