"""Checks that the numbers, branches and speeds of this package are right on this machine."""
