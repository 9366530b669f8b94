"""What is read: checkpoints, their structure, texts."""
