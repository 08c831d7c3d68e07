"""One training run: from settings to its exit code."""
