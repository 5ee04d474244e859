"""What the commands of both packages share: how they begin and end, options, progress, tables, and their limits."""
