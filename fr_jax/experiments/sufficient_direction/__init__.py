"""How far the direction of each stage is from the gradient during training."""
