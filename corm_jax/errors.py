"""Errors that a user can act on."""


class CormError(ValueError):
    """A mistake in the input: the message names the thing, its value and the way out."""


class CheckpointError(CormError):
    """A checkpoint that cannot be used: missing, damaged, foreign or unsupported."""


class CheckpointWarning(UserWarning):
    """A setting that a checkpoint lacks, or has twice, and the assumed value. The commands print it as a note."""


class CacheOverflowError(CormError):
    """A key was evicted because no slot was free, and the caller chose ``overflow="error"``."""
