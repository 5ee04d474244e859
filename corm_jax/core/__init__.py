"""What evicts: slots and who shares them, caches, attention over slots, and the step that uses them."""
