"""Teachers that are programs: networks that torch.export wrote down, run as the graph that they became.

A file may come from anybody. It is read (`pt2`), compared with what a teacher has to be (`signature`) and run (`graph`)
by calls to a list of operators (`operators`). It can cause nothing else to happen.
"""

from kdcore.programs.program import Program, inspect, open_program

__all__ = ["Program", "inspect", "open_program"]
