"""Theorems 1 and 2 of the features replay paper, both sides computed."""
