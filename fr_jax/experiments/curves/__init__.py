"""Draws the curves of several runs in one figure."""
