"""A budget for the whole model to one level per item."""
