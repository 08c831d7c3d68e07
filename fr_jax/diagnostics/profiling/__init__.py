"""Measured times of the jitted functions that a method issues."""
