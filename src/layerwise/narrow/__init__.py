"""Whole units out: `(out, in)` float in, `Narrowed` out."""
