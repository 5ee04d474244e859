"""Traces: the attention of a model while it reads one text, in memory or on disk."""
