"""The walls between the rooms: what may import what, and what must never load torch."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from kdcore.catalog import METHODS
from kdcore.spec.methods import Kd, Supervised

ROOT = Path(__file__).parents[1]


def test_the_import_arrows_of_pyproject_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("room", ["api.main", "worker.tasks", "client.cli", "store.jobs", "kdcore.spec"])
def test_no_room_but_the_engine_loads_torch(room: str):
    look = f"import sys, {room}; sys.exit(bool({{'torch', 'torchvision'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_method_of_the_vocabulary_is_in_the_catalogue():
    names = [get_args(method.model_fields["name"].annotation)[0] for method in (Supervised, Kd)]
    assert names == list(METHODS)
