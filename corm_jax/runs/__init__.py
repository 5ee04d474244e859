"""Runs of a model over texts: how well it predicts, what it attends to, what fits a budget, what heads may forget."""
