"""A model at work: block by block, watched, transformed, with work left out."""
