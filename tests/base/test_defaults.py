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
PROXY_PORT = "8443"
"""Of the TLS proxy, inside its container."""


@pytest.mark.parametrize("name", REPEATED_IN)
def test_port_is_the_one_that_texts_repeat(name: str):
    before = r"127\.0\.0\.1:|0\.0\.0\.0:|EXPOSE |\}:|`DISTILLERY_HOST` \| "
    ports = re.findall(rf"(?:{before})(\d+)", (REPOSITORY / name).read_text())
    assert set(ports) - {PROXY_PORT} == {str(PORT)}
