"""The command line: what a terminal shows, and what it takes."""
