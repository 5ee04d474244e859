"""Eviction: slots and the heads that share them, caches, attention over slots, and the step that uses them."""
