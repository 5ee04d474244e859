"""The commands of ``corm``, a file for each, and the options that they share."""
