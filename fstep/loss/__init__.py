"""Losses: each a function that returns a Ratio."""
