"""Times a training step of every method, side by side."""
