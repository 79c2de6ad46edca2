"""Everything that outlives a process: rows and their transitions, and files."""
