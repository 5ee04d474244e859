"""Families of models, as their ``config.json`` describes them: what each key means, and how the tensors are called."""
