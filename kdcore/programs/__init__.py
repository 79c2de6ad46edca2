"""Teachers that are programs: graphs of networks, as written by torch.export.

A file may be untrusted. It is read (`pt2`), compared with the requirements of a teacher (`signature`) and run (`graph`)
by calls to a list of operators (`operators`). It can cause nothing else to happen.
"""

from kdcore.programs.program import Program, inspect, open_program

__all__ = ["Program", "inspect", "open_program"]
