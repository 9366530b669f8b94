"""How good a model still is: on text, on tasks, on images; against the one it was made from."""
