"""The walls between the rooms: what may import what, and what must never load torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from kdcore.catalog import METHODS
from kdcore.objectives import TAUGHT
from kdcore.spec.methods import NAMES

ROOT = Path(__file__).parents[1]


def test_the_import_arrows_of_pyproject_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("room", ["api.main", "worker.worker", "client.cli", "store.jobs", "kdcore.spec"])
def test_no_room_but_the_engine_loads_torch(room: str):
    look = f"import sys, {room}; sys.exit(bool({{'torch', 'torchvision'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


CANON = (
    "supervised kd dkd nkd dist fitnet attention nst factor_transfer activation_boundary fsp feature rkd sp pkt cc vid "
    "crd ofd reviewkd dml one byot born_again"
)


def test_the_methods_of_the_canon_are_in_the_vocabulary_the_catalogue_and_the_engine():
    """Names are fixed: other people's programs rely on them. Only labels alone need no objective."""
    assert set(CANON.split()) <= set(NAMES)
    assert set(NAMES) == set(METHODS) == {*TAUGHT, "supervised"}
