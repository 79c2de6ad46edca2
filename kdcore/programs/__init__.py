"""Teachers that are programs: files that hold a network's graph beside its weights, from torch.export or as ONNX.

A file may be untrusted. A torch.export program is read (`pt2`), compared with the requirements of a teacher
(`signature`) and run (`graph`, `traced`) by calls to a list of operators (`operators`). An ONNX file is looked through
(`onnx_file`) and run by onnxruntime (`onnx_program`). Neither can cause anything else to happen.
"""

from kdcore.programs.opening import inspect, is_program, open_program
from kdcore.programs.program import Program

__all__ = ["Program", "inspect", "is_program", "open_program"]
