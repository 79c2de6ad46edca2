"""Outputs of teachers that are kept: `teacher.py` reads them or runs the teacher, `key.py` says what decides them,
`layout.py` is their form as bytes, `store.py` the files."""
