"""Errors that a user can act on."""


class CormError(ValueError):
    """A mistake in the input: the message names the thing, its value and the way out."""


class CheckpointError(CormError):
    """A checkpoint that cannot be used: missing, damaged, foreign or unsupported."""


class CheckpointWarning(UserWarning):
    """What a checkpoint does not say, or says twice, and what is assumed: the commands print it as a note."""


class CacheOverflowError(CormError):
    """A key went because no slot was free, and the caller asked for an error instead (``overflow="error"``)."""
