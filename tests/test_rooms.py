"""The walls between the rooms: what may import what, and what must never load torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from kdcore.spec import METHODS

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


CANON = (
    "supervised kd dkd nkd dist fitnet attention nst factor_transfer activation_boundary fsp feature rkd sp pkt cc vid "
    "crd ofd reviewkd dml one byot born_again"
)


def test_methods_hold_the_fixed_names():
    """Other people's programs use these names."""
    assert set(CANON.split()) <= set(METHODS)
