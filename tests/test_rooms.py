"""The import rules between the packages, and which of them must not load torch."""

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


@pytest.mark.parametrize(
    "room", ["api.app", "worker.worker", "client.cli", "store.jobs", "kdcore.spec", "kdcore.protocol"]
)
def test_packages_but_the_engine_do_not_load_torch(room: str):
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
