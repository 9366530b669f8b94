"""What every method shares: contracts, checkpoints, the walk, the plan, safe output."""
