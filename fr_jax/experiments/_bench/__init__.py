"""Interleaved timing of training steps."""
