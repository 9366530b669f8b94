"""Pruned weights learned anew: `(out, in)` float and its mask in, `Learnable` out."""
