"""The version number, in a module that every layer may import.

The build reads the number from this file, and no other file has it.
"""

__version__ = "0.1.0"
