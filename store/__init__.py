"""What outlives a process: rows, their lawful moves, and files."""
