"""Math inside a model."""
