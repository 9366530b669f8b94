"""Several models, tensor by tensor, as one."""
