"""Images per second on one device, beside PyTorch."""
