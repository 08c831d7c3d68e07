"""Experiment programs: ``python -m fr_jax.experiments.<name> --help``."""
