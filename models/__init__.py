"""Model families for fstep, one file each, imported as ``fstep_models``."""
