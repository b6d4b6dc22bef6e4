"""Synthetic worlds in which every answer is known. They import nothing of the rest of the package."""
