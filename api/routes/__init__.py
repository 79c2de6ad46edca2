"""One file per resource. A route declares its problems, and its docstring is its page in the manual."""
