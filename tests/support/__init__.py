"""Helpers of the tests: engines and servers, a fake Hub, programs, the reference's numbers."""
