"""Eviction rules as specifications: which keys should survive, and proofs that they do. Independent of the model."""
