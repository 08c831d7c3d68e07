"""Simulates more stages and slower links."""
