"""Eviction rules as specifications: what should survive, and proofs that it does. Knows nothing of the model."""
