"""Fewer weights: `(out, in)` float in, `Pruned` out."""
