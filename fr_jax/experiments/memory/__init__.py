"""Counts what a step of each method holds in memory."""
