"""The decoder, and what a checkpoint needs to be one: weights, tokenizer, chat template."""
