"""The routes: one file per resource. Each declares its problems; its docstring is its text in the API manual."""
