"""What is kept: results on disk, and output that appears whole or not at all."""
