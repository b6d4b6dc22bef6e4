"""Synthetic worlds in which every answer is known. They import nothing from the rest of the package."""
