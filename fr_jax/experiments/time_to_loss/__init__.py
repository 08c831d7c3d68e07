"""Compares methods by the time that they need to back-propagation's held-out loss."""
