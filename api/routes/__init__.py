"""One file a resource. A route declares what may go wrong; its docstring is the manual page; its work is short."""
