"""From gradients to new params."""
