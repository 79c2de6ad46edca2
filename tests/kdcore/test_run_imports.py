"""The imports of a run: a job's first step waits for all of them."""

import subprocess
import sys
from pathlib import Path

from tests.kdcore.engine import write_arrays

ROOT = Path(__file__).parents[2]
RUNS = """
import sys
from pathlib import Path
from kdcore.run import run

print(*sys.modules)
from tests.kdcore.engine import workspace, supervised

folder = Path(sys.argv[1])
for optimizer in ("sgd", "adamw"):
    spec = supervised(folder / "data.npz", epochs=1, optimizer=optimizer, checkpoint_every_s=0)
    run(spec, workspace(folder / optimizer)[0])
    run(spec, workspace(folder / "again")[0], min((folder / optimizer / "checkpoints").iterdir()))
print(*sys.modules)
"""


def test_run_runs_and_resumes_import_neither_pytorchs_compiler_nor_torchvision(tmp_path):
    """The compiler alone (with sympy) takes longer to import than torch, and some rare functions import it."""
    write_arrays(tmp_path / "data.npz")
    done = subprocess.run([sys.executable, "-c", RUNS, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    ready, loaded = (set(line.split()) for line in done.stdout.splitlines())
    assert "kdcore.training" in loaded and "torch.optim.adamw" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy", "torchvision", "timm"}
    # An engine that waits for a job has imported nothing that only some jobs need.
    assert not ready & {"jinja2", "huggingface_hub", "tensorboard", "onnx", "onnxruntime", "openvino"}
