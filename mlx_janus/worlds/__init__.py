"""Synthetic worlds in which every answer is known. They import nothing else of the package."""
