"""The flow: what `inspect`, `plan`, `compress` and `evaluate` do, from the rooms' parts."""
