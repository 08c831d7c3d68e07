"""Trains one network by several methods and compares them."""
