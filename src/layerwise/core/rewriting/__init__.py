"""A model as another that is the same function, or a smaller one."""
