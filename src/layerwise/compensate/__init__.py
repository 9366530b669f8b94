"""Repair of what an approximation lost: `(out, in)` floats in, `LowRank` out."""
