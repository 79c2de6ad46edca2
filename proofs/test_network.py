"""Nothing leaves the machine: no process of a service calls another one in a whole job with all its files.

By Python's audit hooks in API, worker, engines and their children, and by the kernel's calls of all processes, since
native libraries (those of ONNX, OpenVINO, MLflow have sent telemetry) pass by the hooks. MLflow's tracker is a folder.
"""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from kdcore.spec import ExportFormat
from kdcore.spec.shipping import Document
from tests.end_to_end.embedded_server import embedded_server
from tests.end_to_end.network import watched

pytestmark = pytest.mark.slow
TRAINING = {"epochs": 1, "batch_size": 64, "seed": 1}
SUPERVISED = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": TRAINING}
JOB_S = 300


def test_a_whole_job_with_all_its_files_calls_no_other_machine(tmp_path: Path):
    seen = watched(tmp_path / "network")
    if not seen.strace:
        pytest.skip("there is no strace here; tests/end_to_end/test_embedded.py looks at the audit hooks alone")
    tracker = tmp_path / "runs"
    settings = {"DISTILLERY_MLFLOW_TRACKING_URI": f"file://{tracker}"} if find_spec("mlflow") else {}
    with embedded_server(tmp_path / "home", seen.strace, **seen.environment, **settings) as server:
        files = {"export": list(get_args(ExportFormat)), "documents": list(get_args(Document))}
        job = server.submit({**SUPERVISED, **files})
        server.wait_until(lambda: server.get(f"/v1/jobs/{job}")["status"] in ("succeeded", "failed"), JOB_S)
        done = server.ended(job)
        names = {one["name"] for one in server.get(f"/v1/jobs/{job}/artifacts")["data"]}
        assert "student.safetensors" in names
        picture = io.BytesIO()
        Image.new("RGB", (40, 30), "red").save(picture, "JPEG")
        answer = server.http.post(f"/v1/jobs/{job}/predict", content=picture.getvalue())
        assert answer.status_code in (200, 202), answer.text
        if settings:
            server.wait_until(lambda: len(list(tracker.rglob("distillery.job"))) == 1, JOB_S)
        assert not [one for one in done["warnings"] if one["code"] == "tracking_failed"]
    commands = seen.began()
    for program in ("serve", "kdcore run", *(["worker.tracking"] if settings else [])):
        assert any(program in one for one in commands), (program, commands)
    assert seen.elsewhere() == []
    assert seen.calls_elsewhere() == []
