"""Runs of a model over texts: prediction under a policy, recording of traces, windows for a budget or for each head."""
