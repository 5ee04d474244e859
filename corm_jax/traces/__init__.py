"""Traces: what a model attended to while it read one text, in memory or on disk."""
