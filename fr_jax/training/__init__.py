"""Training around an ``Algorithm``: data, augmentation, checkpoints, metrics, the loop and its plots."""
