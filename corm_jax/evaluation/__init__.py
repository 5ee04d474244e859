"""Evaluation: tasks, how a policy does on them, and result directories that survive being killed."""
