"""What a step and a pool cost."""
