"""Architectures of GGUF files, as their metadata describes them: what each key means, how tensors are called."""
