import re
from pathlib import Path

import pytest

from base.defaults import PORT

REPOSITORY = Path(__file__).parents[2]
REPEATED_IN = (
    "run",
    "Dockerfile",
    "docker-compose.yml",
    ".env.example",
    "README.md",
    "docs/containers.md",
    "docs/guide.md",
)


@pytest.mark.parametrize("name", REPEATED_IN)
def test_port_is_the_one_that_texts_repeat(name: str):
    ports = re.findall(
        r"(?:127\.0\.0\.1:|0\.0\.0\.0:|EXPOSE |\}:|`DISTILLERY_HOST` \| )(\d+)", (REPOSITORY / name).read_text()
    )
    assert set(ports) == {str(PORT)}
