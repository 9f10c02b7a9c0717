"""Golden batches: what one update is made of, stage by stage, for comparison with veRL."""
