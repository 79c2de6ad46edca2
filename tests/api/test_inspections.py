"""Inspections are run once, in child processes that are limited and that end with the request."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest
from anyio import to_thread
from sqlalchemy import Connection, select, update

from api.inspections import Inspections, Inspector, Refused, Thumbnails, memory_bytes
from base.errors import StorageFull
from kdcore.catalog import DatasetFacts, ModelFacts, PublishedFacts, StartFacts, TapFacts
from kdcore.catalog.facts import LogitsFacts, ProgramFacts
from kdcore.spec import DataOptions
from store import registry, tables
from store.database import migrate
from store.records import database_now
from store.settings import Settings
from tests.api.conftest import DATASET, MODEL, Service
from tests.servers import Api
from tests.worker.processes import until

pytestmark = pytest.mark.anyio

FACTS = {
    "architecture": "resnet20",
    "num_classes": 10,
    "channels": 3,
    "parameters": 272_474,
    "bytes": 1_100_000,
    "format": "pytorch",
}
SMALL = {"classes": 10, "channels": 1, "image_size": (8, 8)}


def inspector_of(tmp_path: Path, *lines: str) -> Inspector:
    """An inspector whose engine is a script of these lines."""
    script = tmp_path / "engine.py"
    script.write_text("import json, os, sys, time\n" + "\n".join(lines))
    return Inspector(tmp_path / "inspect", [sys.executable, str(script)], timeout_s=10)


async def refusal(inspector: Inspector) -> Refused:
    with pytest.raises(Refused) as raised:
        await inspector.inspect(ModelFacts, "x.pt")
    return raised.value


async def test_inspector_reads_facts_from_the_last_line(tmp_path: Path) -> None:
    answer = json.dumps({"ok": True, "facts": FACTS})
    inspector = inspector_of(tmp_path, "print('loading')", f"print({answer!r})")
    assert await inspector.inspect(ModelFacts, "x.pt", architecture="resnet20") == ModelFacts(**FACTS)


@pytest.mark.parametrize(
    ("kind", "subject", "options", "arguments"),
    [
        (DatasetFacts, ["x.npz"], {"image_size": 32}, "inspect dataset --image-size=32 -- x.npz"),
        (DatasetFacts, ["x.npz"], {"image_size": None}, "inspect dataset -- x.npz"),
        (ModelFacts, ["x.pt"], {"architecture": "resnet20"}, "inspect model --architecture=resnet20 -- x.pt"),
        (ModelFacts, ["x.pt"], {"part": "ema", "averaged": False}, "inspect model --part=ema --averaged=false -- x.pt"),
        (StartFacts, ["x.pt"], {"freeze": ("a", "b")}, "inspect start --freeze=a --freeze=b -- x.pt"),
        (StartFacts, ["x.pt"], {"freeze": ()}, "inspect start -- x.pt"),
        (ProgramFacts, ["x.pt2"], {}, "inspect program -- x.pt2"),
        (LogitsFacts, ["x.npz"], {}, "inspect logits -- x.npz"),
        (TapFacts, ["n", "a", "b"], SMALL, "inspect taps --classes=10 --channels=1 --image-size 8 8 -- n a b"),
    ],
    ids=["data set with a size", "data set", "model", "part", "start", "nothing frozen", "program", "logits", "taps"],
)
async def test_inspector_passes_arguments_to_the_engine(
    tmp_path: Path, kind: type[ModelFacts], subject: list[str], options: dict[str, object], arguments: str
) -> None:
    inspector = inspector_of(tmp_path, f"open({str(tmp_path / 'argv')!r}, 'w').write(' '.join(sys.argv[1:]))")
    with pytest.raises(Refused):
        await inspector.inspect(kind, *subject, **options)
    assert (tmp_path / "argv").read_text() == arguments


async def test_inspector_raises_the_engines_refusal(tmp_path: Path) -> None:
    error = {"code": "teacher_mismatch", "message": "not a resnet20", "retryable": False, "hint": "try resnet56"}
    answer = json.dumps({"ok": False, "error": error})
    refused = await refusal(inspector_of(tmp_path, f"print({answer!r})"))
    assert vars(refused) == {
        "code": "teacher_mismatch", "message": "not a resnet20", "hint": "try resnet56", "final": True, "option": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sys.exit('torn apart')", "exit code 1"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("print('{')", "exit code 0"),
        ("print(json.dumps({'ok': True, 'facts': {'architecture': 1}}))", "cannot read"),
    ],
    ids=["exit", "signal", "broken output", "other facts"],
)
async def test_inspector_that_crashes_refuses_but_not_finally(tmp_path: Path, line: str, message: str) -> None:
    refused = await refusal(inspector_of(tmp_path, line))
    assert (refused.code, refused.final) == ("internal", False)
    assert message in refused.message


@pytest.mark.parametrize(
    "line",
    [
        "raise MemoryError",
        "sys.exit('RuntimeError: can\\'t allocate memory: you tried to allocate 5 bytes')",
        "print(json.dumps({'ok': False, 'error': {'code': 'out_of_memory', 'message': 'x', 'hint': 'batch_size'}}))",
    ],
    ids=["Python", "torch", "reported"],
)
async def test_inspector_says_that_memory_is_short(tmp_path: Path, line: str) -> None:
    refused = await refusal(inspector_of(tmp_path, line))
    assert (refused.code, refused.final) == ("out_of_memory", False)
    assert (
        refused.message == f"the inspection ran out of memory; it may take {memory_bytes() / 1e9:.1f} GB on this host"
    )
    assert "batch_size" not in (refused.hint or "")


@pytest.mark.parametrize(("host", "most"), [(None, 2), (2, 1), (16, 4), (32, 8), (1024, 8)])
def test_memory_bytes_is_a_part_of_the_hosts(monkeypatch: pytest.MonkeyPatch, host: int | None, most: int) -> None:
    monkeypatch.setattr("api.inspections.host_memory", lambda: host and host << 30)
    assert memory_bytes() == most << 30


async def test_inspector_gives_long_arguments_in_a_file(tmp_path: Path) -> None:
    """The kernel accepts 128 KiB each: names of classes may be more."""
    copy = f"open({str(tmp_path / 'copy')!r}, 'w').write(open(sys.argv[-1]).read())"
    inspector = inspector_of(tmp_path, f"open({str(tmp_path / 'argv')!r}, 'w').write(sys.argv[2])", copy)
    for text in ("x" * 200_000, "\ud800", "a\0b"):
        with pytest.raises(Refused):
            await inspector.inspect(DatasetFacts, "x.npz", options=text)
        assert (tmp_path / "argv").read_text() == "--arguments"
        assert json.loads((tmp_path / "copy").read_text()) == ["dataset", f"--options={text}", "--", "x.npz"]


async def test_inspector_kills_a_child_that_hangs_and_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    lines = (
        "child = os.fork()",
        f"open({str(pids)!r}, 'a').write(str(os.getpid()) + ' ')",
        "time.sleep(60)",
    )
    inspector = inspector_of(tmp_path, *lines)
    inspector._timeout_s = 1.0
    assert (await refusal(inspector)).code == "timeout"
    assert all(ended(int(pid)) for pid in pids.read_text().split())


def ended(pid: int) -> bool:
    """Return True if the process has ended or is a zombie; the signal may take a moment to arrive."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


async def test_inspector_hides_the_servers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_ADMIN_KEY_HASH", "secret")
    path = tmp_path / "environment"
    await refusal(inspector_of(tmp_path, f"open({str(path)!r}, 'w').write(json.dumps(dict(os.environ)))"))
    environment = json.loads(path.read_text())
    assert "DISTILLERY_ADMIN_KEY_HASH" not in environment
    assert environment["HOME"] != os.environ.get("HOME")
    assert Path(environment["TMPDIR"]).parent == tmp_path / "inspect"


async def test_inspector_limits_the_files_of_its_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inspections.FILE_BYTES", 1000)
    grown = tmp_path / "grown"
    lines = (
        "import signal",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        f"open({str(grown)!r}, 'wb').write(b'x' * 5000)",
    )
    await refusal(inspector_of(tmp_path, *lines))
    assert grown.stat().st_size <= 1000


async def test_inspector_raises_storage_full_if_there_is_no_space_for_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    inspector = inspector_of(tmp_path)
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StorageFull):
        await inspector.inspect(ModelFacts, "x.pt")
    monkeypatch.undo()
    assert not list((tmp_path / "inspect").glob("*"))


DATA = DATASET.model_dump(mode="json")
PLACES = {"side": 8, "columns": 2, "classes": [0, 1]}
PRINTS_DATA = f"print(json.dumps({{'ok': True, 'facts': json.loads({json.dumps(DATA)!r}), 'thumbnails': {PLACES}}}))"


async def test_inspector_reports_progress_and_gives_the_thumbnails(tmp_path: Path) -> None:
    progress = "print(json.dumps({'progress': {'done': %d, 'total': 10}}))"
    lines = (
        "sheet = sys.argv[sys.argv.index('--thumbnails') + 1]",
        "open(sheet, 'wb').write(b'PNG')",
        "assert '--progress' in sys.argv",
        *(progress % done for done in (1, 5)),
        "print(json.dumps({'progress': {'done': -1}}))",
        "print('{\"progress\": torn')",
        PRINTS_DATA,
    )
    seen: list[tuple[int, int]] = []
    kept: list[tuple[bytes, dict[str, object]]] = []

    async def keep(path: Path, places: Thumbnails) -> None:
        kept.append((await to_thread.run_sync(path.read_bytes), places.model_dump()))

    inspector = inspector_of(tmp_path, *lines)
    facts = await inspector.inspect(DatasetFacts, "x.npz", on_progress=lambda *of: seen.append(of), keep=keep)
    assert (facts, seen, kept) == (DATASET, [(1, 10), (5, 10)], [(b"PNG", PLACES)])


@pytest.mark.parametrize(
    "line",
    [
        "os.symlink('/etc/passwd', sheet)",
        "os.mkfifo(sheet)",
        "open(sheet, 'wb').write(b'<svg')",
        "os.mkdir(sheet)",
        "pass",
    ],
    ids=["link", "pipe", "other file", "folder", "none"],
)
async def test_inspections_store_no_thumbnails_but_a_png(service: Service, tmp_path: Path, line: str) -> None:
    """A child that a user's file has taken over may leave anything."""
    inspector = inspector_of(tmp_path, "sheet = sys.argv[sys.argv.index('--thumbnails') + 1]", line, PRINTS_DATA)
    inspections = Inspections(service.db, service.files, inspector)
    with pytest.raises(Refused, match="cannot read the thumbnails") as raised:
        await inspections.dataset("0" * 64, DataOptions())
    assert not raised.value.final


async def test_inspections_inspect_a_pictured_data_set_again_only_if_its_thumbnails_are_gone(
    service: Service, tmp_path: Path
) -> None:
    lines = (
        "sheet = sys.argv[sys.argv.index('--thumbnails') + 1]",
        "open(sheet, 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n')",
        f"open({str(tmp_path / 'runs')!r}, 'a').write('.')",
        PRINTS_DATA,
    )
    inspections = Inspections(service.db, service.files, inspector_of(tmp_path, *lines))
    options = DataOptions()
    for _ in range(2):
        assert await inspections.dataset("0" * 64, options, pictured=True) == DATASET
    sheet = await inspections.thumbnails("0" * 64, options)
    assert sheet is not None and sheet == {"sha256": sheet["sha256"], **PLACES}
    assert (tmp_path / "runs").read_text() == "."
    service.files.path(sheet["sha256"]).unlink()
    assert await inspections.thumbnails("0" * 64, options) is None
    await inspections.dataset("0" * 64, options)
    assert (tmp_path / "runs").read_text() == ".", "a job does not need them"
    await inspections.dataset("0" * 64, options, pictured=True)
    assert (tmp_path / "runs").read_text() == ".."
    assert await inspections.thumbnails("0" * 64, options) == sheet


async def test_inspector_with_the_real_engine_reads_a_data_set(tmp_path: Path) -> None:
    """Two classes of 20 grey 8 x 8 images, 6 of them for the test."""
    path = tmp_path / "data.npz"
    pixels = np.arange(26 * 64, dtype=np.uint8).reshape(26, 8, 8)
    labels = np.arange(26) % 2
    np.savez(path, x_train=pixels[:20], y_train=labels[:20], x_test=pixels[20:], y_test=labels[20:])
    facts = await Inspector(tmp_path / "inspect").inspect(DatasetFacts, str(path))
    assert (facts.num_classes, facts.channels, facts.train, facts.test) == (2, 1, 20, 6)


async def test_inspector_with_the_real_engine_reads_taps(tmp_path: Path) -> None:
    facts = await Inspector(tmp_path / "inspect").inspect(TapFacts, "convnet4", "layer2", "fc@in", **SMALL)
    assert facts == TapFacts(shapes={"layer2": [8, 4, 4], "fc@in": [8]})


async def test_inspector_with_the_real_engine_refuses_a_file_that_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(Refused) as raised:
        await Inspector(tmp_path / "inspect").inspect(DatasetFacts, str(path))
    assert raised.value.code == "dataset_unreadable"


def inspections_of(service: Service) -> Inspections:
    return Inspections(service.db, service.files, service.inspector)


async def test_inspections_run_once_per_subject_and_options(service: Service) -> None:
    inspections = inspections_of(service)
    for _ in range(2):
        facts = await inspections.inspect(TapFacts, "resnet20", "layer3", **SMALL)
        assert facts == TapFacts(shapes={"layer3": [4, 4, 4]})
    assert service.inspector.requests == [("taps", "resnet20", "layer3", SMALL)]
    await inspections.inspect(TapFacts, "resnet56", "layer3", **SMALL)
    await inspections.inspect(TapFacts, "resnet20", "layer2", **SMALL)
    await inspections.inspect(TapFacts, "resnet20", "layer3", **{**SMALL, "image_size": (32, 32)})
    assert len(service.inspector.requests) == 4


async def test_inspections_with_many_options_have_a_key_that_fits(service: Service) -> None:
    digest = (await service.upload(b"pictures")).removeprefix("sha256:")
    for names in (list("abcd"), ["a" * 100, "b" * 100, "c", "d"]):
        for _ in range(2):
            await inspections_of(service).dataset(digest, DataOptions(class_names=names))
    keys = await service.db.read(lambda connection: connection.scalars(select(tables.inspections.c.key)).all())
    assert len(service.inspector.requests) == 2 and max(map(len, keys)) <= 200


async def test_inspections_note_that_they_are_used(service: Service) -> None:
    """Once a day: the collector deletes those that are not."""
    inspections = inspections_of(service)
    ages = []
    for aged_s in (0, 3600, 2 * 86_400):
        await inspections.inspect(TapFacts, "resnet20", "layer3", **SMALL)

        def age(connection: Connection, by: float = aged_s) -> float:
            rows = tables.inspections
            found = connection.execute(select(database_now() - rows.c.seen_at)).scalar_one()
            connection.execute(update(rows).values(seen_at=rows.c.seen_at - by))
            return float(found)

        ages.append(await service.db.write(age))
    await inspections.inspect(TapFacts, "resnet20", "layer3", **SMALL)
    ages.append(await service.db.write(lambda connection: age(connection, 0)))
    assert [round(one / 3600) for one in ages] == [0, 0, 1, 0] and len(service.inspector.requests) == 1


async def test_inspections_of_models_are_told_apart_by_the_names_of_their_options(service: Service) -> None:
    """An architecture and a part of the same name are two choices, and what an earlier version stored is none."""
    digest = (await service.upload(b"weights")).removeprefix("sha256:")
    stored = MODEL.model_dump(mode="json")
    for key in ("", "ema", "ema reading=2"):
        await service.db.write(registry.put_inspection, digest, "model", key, stored)
    inspections = inspections_of(service)
    for options in ({}, {"architecture": "ema"}, {"part": "ema"}, {"averaged": False}, {"averaged": True}):
        for _ in range(2):
            await inspections.inspect(ModelFacts, digest, **options)
    assert len(service.inspector.requests) == 5
    start = {"architecture": "convnet8", "classes": 10, "channels": 1}
    for frozen in ((), ("layer1",), ("layer1", "layer2")):
        for _ in range(2):
            await inspections.inspect(StartFacts, digest, **start, freeze=frozen)
    assert len(service.inspector.requests) == 8


async def test_inspections_of_published_weights_are_made_again_by_another_version_of_their_library(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, times in (("1.0", 1), ("1.0", 1), ("1.1", 2)):
        monkeypatch.setattr("api.inspections.version", lambda _, version=version: version)
        await inspections_of(service).inspect(PublishedFacts, "timm/resnet18.a1_in1k")
        assert len(service.inspector.requests) == times


@pytest.mark.parametrize(("final", "times"), [(True, 1), (False, 2)], ids=["final", "timeout"])
async def test_inspections_store_final_refusals_only(service: Service, final: bool, times: int) -> None:
    service.inspector.answers["resnet20"] = Refused("spec_invalid", "no such tap", "near it: layer3", final)
    for _ in range(2):
        with pytest.raises(Refused) as raised:
            await inspections_of(service).inspect(TapFacts, "resnet20", "layer9", **SMALL)
        assert vars(raised.value) == vars(service.inspector.answers["resnet20"])
    assert len(service.inspector.requests) == times


def test_inspections_of_a_killed_server_end_and_the_next_server_removes_their_folders(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    settings.home.mkdir()
    migrate(settings.database_url)
    folder = settings.home / "inspect"
    api = Api(settings, tmp_path / "log")
    asking = Thread(target=ask_for_a_network, args=(api,))
    try:
        asking.start()
        child = until(lambda: next(inspecting(folder), None), "the inspection to begin")
        # Otherwise it might end by itself.
        os.kill(child, signal.SIGSTOP)
        assert list(folder.iterdir())
    finally:
        api.kill()
        asking.join()
        api.http.close()
    until(lambda: child not in inspecting(folder), "the child to end")
    again = Api(settings, tmp_path / "log")
    try:
        assert not list(folder.iterdir())
    finally:
        again.stop()


def ask_for_a_network(api: Api) -> None:
    """Submit a network of timm, which is inspected. The server is killed before it answers."""
    with pytest.raises(httpx.TransportError):
        api.post(student="timm/resnet18")


def inspecting(folder: Path) -> Iterator[int]:
    """Process ids of engines whose home is below this folder. One that is still `api.process_limits` is not counted: it
    may not be tied to its server yet."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"HOME={folder}/".encode() in (process / "environ").read_bytes()
            if ours and b"kdcore\0inspect" in (process / "cmdline").read_bytes().split(b"api.process_limits")[0]:
                yield int(process.name)
        except OSError:
            continue
