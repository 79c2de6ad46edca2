"""One file a resource. Each route: what may go wrong is declared, the docstring is the manual page, the work is short."""
