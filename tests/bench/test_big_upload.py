"""The bench of large uploads in a small form: three cuts, and the bytes arrive whole."""

import os
import shutil
from pathlib import Path

from api.app import create_app
from bench.big_upload import BLOCK_BYTES, content, measure
from store.settings import Settings
from tests.servers import served


def test_content_is_the_same_bytes_from_any_place():
    size = 2 * BLOCK_BYTES + 100
    whole = b"".join(content(0, size))
    assert len(whole) == size and whole[:BLOCK_BYTES] != whole[BLOCK_BYTES : 2 * BLOCK_BYTES]
    for begin in (1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 99):
        assert b"".join(content(begin, size)) == whole[begin:]


def test_an_upload_that_is_cut_three_times_arrives_whole(sqlite_template: Path, tmp_path: Path):
    shutil.copy(sqlite_template, tmp_path / "distillery.db")
    settings = Settings(home=tmp_path, min_free_bytes=0)
    with served(create_app(settings, wake_workers=lambda: None)) as url:
        found = measure(url, os.getpid(), settings.files, 5 * BLOCK_BYTES + 1, cuts=3)
    assert found.whole
    assert len(found.resumed_at) == 3 and found.resumed_at == sorted(found.resumed_at)
    assert found.resumed_at[-1] > 0
