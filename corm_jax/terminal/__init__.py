"""Shared by the commands of both packages: how they begin and end, options, progress, tables, and limits."""
