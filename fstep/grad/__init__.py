"""How gradients come."""
