"""What a run has to tell, before it starts and after it."""
