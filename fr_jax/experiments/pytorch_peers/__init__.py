"""Seconds per update of PyTorch's pipelines and data parallelism."""
