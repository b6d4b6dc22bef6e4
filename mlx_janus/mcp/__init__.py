"""Tools over the Model Context Protocol, which draw, read and change images with the engine."""
