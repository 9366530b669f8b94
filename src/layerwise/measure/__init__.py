"""What a layer or a block is like, as one number: higher is more important, or more damaged."""
