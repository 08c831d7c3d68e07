"""Images per second on one device, compared with PyTorch."""
