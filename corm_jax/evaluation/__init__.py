"""Evaluation: tasks, the results of policies on them, and result directories that survive a kill."""
