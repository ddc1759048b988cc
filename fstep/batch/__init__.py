"""What goes into a step."""
