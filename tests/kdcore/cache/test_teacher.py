"""The cache in front of a teacher: the student's bits never depend on it, and it computes only what is missing."""

import errno
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from base.data_cache import TEACHER
from kdcore.cache import key as teacher_key
from kdcore.cache import store as view_store
from kdcore.cache import teacher as teacher_cache
from kdcore.cache.store import ViewStore
from kdcore.cache.teacher import CachedTeacher
from kdcore.checkpoint import Stopped
from kdcore.classifier import FrozenTeacher
from kdcore.data.views import Batches, Views
from kdcore.device import Computing
from kdcore.lesson import View
from kdcore.prepare import prepare
from kdcore.run import run
from kdcore.training import StageTraining
from tests.kdcore.engine import (
    distilled,
    events,
    job,
    method_job,
    same,
    workspace,
    write_arrays,
    write_pool,
    write_teacher,
)

EPOCHS, STEPS, BATCH = 3, 6, 16
SEEN = EPOCHS * STEPS * BATCH
"""Views that a student of `spec_of` sees."""
TRIED = 2
"""Pieces of noise that a teacher is tried on."""


@pytest.fixture(autouse=True)
def any_disk(monkeypatch):
    monkeypatch.setattr(view_store, "MIN_FREE_BYTES", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "blobs.npz")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t.safetensors")


def spec_of(data, teacher, method="kd", **training):
    """Three epochs of six steps, of at most 18 views of each of 108 images."""
    return distilled(data, teacher, baseline="none", method=method, **{"epochs": EPOCHS, **training})


def finish(spec, folder, cache=None, max_bytes=None):
    """Returns the student of a job, what its report says of the cache, and its warnings about it."""
    where, stream = workspace(folder, cache)
    if max_bytes is not None:
        where.teacher_cache_max_bytes = max_bytes
    report = run(spec, where)
    codes = [line["code"] for line in events(stream, "warning") if line["pointer"] == "/training/teacher_cache"]
    return load_file(where.out / "student.safetensors"), report["teacher_cache"], codes


@pytest.fixture(scope="module")
def plain(data, teacher, tmp_path_factory):
    """The student of a job whose teacher's outputs are kept nowhere."""
    student, report, _ = finish(spec_of(data, teacher, teacher_cache="off"), tmp_path_factory.mktemp("off"))
    assert report["setting"] == "off" and not report["used"] and report["stored"] == 0
    return student


@pytest.fixture(scope="module")
def filled(data, teacher, tmp_path_factory):
    """A cache that a job has filled."""
    folder = tmp_path_factory.mktemp("filled")
    finish(spec_of(data, teacher), folder / "job", folder / "cache")
    return folder / "cache"


@pytest.fixture
def rows(monkeypatch):
    """The number of rows that the teacher is run on in each call."""
    seen: list[int] = []
    forward = FrozenTeacher.forward

    def counted(self, batch):
        seen.append(len(batch.index))
        return forward(self, batch)

    monkeypatch.setattr(FrozenTeacher, "forward", counted)
    return seen


def entries(cache):
    return sorted(cache.glob(f"*{TEACHER}"))


def test_a_student_is_the_same_without_a_cache_with_a_cold_and_with_a_warm_one(data, teacher, plain, tmp_path, rows):
    """A second job computes nothing but what it compares: once noise for its key, once stored views."""
    spec, cache = spec_of(data, teacher), tmp_path / "cache"
    cold, first, _ = finish(spec, tmp_path / "cold", cache)
    assert first["used"] and first["hits"] + first["misses"] == SEEN and first["stored"] == first["misses"] < SEEN
    cold_rows, rows[:] = sum(rows), []
    warm, second, codes = finish(spec, tmp_path / "warm", cache)
    assert (second["hits"], second["misses"], second["stored"], second["compared"]) == (SEEN, 0, 0, BATCH)
    assert sum(rows) == 2 + (TRIED + 1) * BATCH  # 2: the lesson from which an objective is built.
    assert cold_rows >= first["misses"] and not codes
    assert same(cold, plain) and same(warm, plain)
    assert second["bytes"] == first["bytes"] == sum(view_store.size_of(entry) for entry in entries(cache))


def test_a_second_job_computes_only_what_is_missing(data, teacher, filled, tmp_path, rows):
    """With another seed it sees other views, other batches and other held-out images. In pieces, of which only the last
    of an epoch is not full."""
    spec = spec_of(data, teacher, seed=1)
    without, _, _ = finish(spec_of(data, teacher, seed=1, teacher_cache="off"), tmp_path / "off")
    rows.clear()
    shutil.copytree(filled, tmp_path / "cache")
    student, report, _ = finish(spec, tmp_path / "job", tmp_path / "cache")
    assert 0 < report["misses"] < SEEN and report["hits"] + report["misses"] == SEEN
    assert len(rows) <= 1 + TRIED + 1 + report["misses"] // BATCH + EPOCHS
    assert same(student, without)


@pytest.mark.parametrize("batch", [16, 36, 100])
def test_a_student_is_the_same_for_any_size_of_batches(batch, data, teacher, tmp_path):
    """Pieces have 64 rows at most: a batch of 100 is two pieces, of which one reaches into the next batch."""
    off, cold, warm = (
        finish(spec_of(data, teacher, batch_size=batch, teacher_cache=how), tmp_path / name, tmp_path / "cache")[0]
        for name, how in (("off", "off"), ("cold", "exact"), ("warm", "exact"))
    )
    assert same(off, cold) and same(off, warm)


def test_a_half_filled_and_damaged_cache_changes_no_bit(data, teacher, plain, filled, tmp_path):
    """The end is cut off, as by a kill; a bit is changed; a file is no file of ours."""
    cache = tmp_path / "cache"
    (source,) = entries(filled)
    (cache / source.name).mkdir(parents=True)
    content = bytearray(next(source.glob("*.views")).read_bytes())
    changed = bytearray(content)
    changed[-10] ^= 4
    for name, part in (("cut", content[: len(content) * 2 // 3]), ("changed", changed), ("foreign", b"?" * 999)):
        (cache / source.name / f"{name}.views").write_bytes(part)
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job", cache)
    assert same(student, plain) and not codes
    assert report["hits"] > 0 and report["misses"] > 0


def test_a_full_budget_changes_no_bit_and_stays_within_it(data, teacher, plain, tmp_path):
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job", tmp_path / "cache", max_bytes=5000)
    assert same(student, plain) and not codes
    assert 0 < report["stored"] < report["misses"]
    assert any("5,000 bytes (DISTILLERY_TEACHER_CACHE_MAX_BYTES)" in note for note in report["notes"])
    assert sum(view_store.size_of(entry) for entry in entries(tmp_path / "cache")) <= 5000


@pytest.mark.parametrize("works", [0, 1])
def test_a_full_disk_turns_the_cache_off_with_a_warning(works, data, teacher, plain, tmp_path, monkeypatch):
    """At the first block, or at a later one; the job goes on."""
    write, done = ViewStore._write, [0]

    def full(self, block):
        done[0] += 1
        if done[0] > works:
            self._output and self._output.write(block[:50])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, block)

    monkeypatch.setattr(ViewStore, "_write", full)
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job", tmp_path / "cache")
    assert same(student, plain) and codes == ["teacher_cache_off"]
    assert done[0] == works + 1 and any("No space left" in note for note in report["notes"])
    assert report["used"] is bool(works)
    monkeypatch.undo()
    monkeypatch.setattr(view_store, "MIN_FREE_BYTES", 0)
    again, report, codes = finish(spec_of(data, teacher), tmp_path / "again", tmp_path / "cache")
    assert same(again, plain) and not codes and bool(report["hits"]) >= bool(works)


@pytest.mark.parametrize("steps", [0, STEPS + 2])
def test_a_file_that_is_cut_off_while_it_is_read_changes_no_bit(
    steps, data, teacher, plain, filled, tmp_path, monkeypatch
):
    """Before stored views are compared, and within an epoch."""
    cache, reads, read = tmp_path / "cache", [0], ViewStore.read
    shutil.copytree(filled, cache)

    def cut(self, places):
        reads[0] += 1
        if reads[0] > steps:
            for path in self.folder.glob("*.views"):
                os.truncate(path, 100)
        return read(self, places)

    monkeypatch.setattr(ViewStore, "read", cut)
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job", cache)
    assert same(student, plain) and codes == ["teacher_cache_off"]
    assert report["hits"] + report["misses"] == SEEN and report["used"] is bool(report["hits"]) is bool(steps)


def test_the_smaller_of_two_limits_is_named(data, teacher, tmp_path):
    where, _ = workspace(tmp_path)
    prepared = prepare(spec_of(data, teacher), where)
    for limit, named in ((None, (2_000_000_000, "DISTILLERY_TEACHER_CACHE_MAX_BYTES")),
                         (999, (999, "DISTILLERY_CACHE_MAX_BYTES"))):  # fmt: skip
        where.cache_max_bytes = limit
        cache = teacher_cache.in_front(prepared, where)
        assert (cache.max_bytes, cache.setting) == named


def test_a_cache_that_cannot_be_opened_is_a_warning(data, teacher, plain, tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ViewStore, "__init__", refused)
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job")
    assert same(student, plain) and codes == ["teacher_cache_off"] and not report["used"]


def test_stored_outputs_that_this_machine_does_not_compute_are_not_used(data, teacher, plain, tmp_path, monkeypatch):
    """A teacher that computed otherwise has filled the entry, under a key that does not tell it."""
    forward, cache = FrozenTeacher.forward, tmp_path / "cache"

    def other(self, batch):
        view = forward(self, batch)
        return type(view)(view.logits + 0.125)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenTeacher, "forward", other)
        finish(spec_of(data, teacher), tmp_path / "other", cache)
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job", cache)
    assert same(student, plain) and codes == ["teacher_cache_off"] and report["hits"] == 0


def test_a_teacher_that_runs_ahead_uses_the_cache(data, teacher, tmp_path):
    spec = spec_of(data, teacher, overlap=True)
    off, _, _ = finish(spec_of(data, teacher, overlap=True, teacher_cache="off"), tmp_path / "off")
    cold, first, _ = finish(spec, tmp_path / "cold", tmp_path / "cache")
    warm, second, codes = finish(spec, tmp_path / "warm", tmp_path / "cache")
    assert first["stored"] and (second["hits"], second["misses"]) == (SEEN, 0) and not codes
    assert same(off, cold) and same(off, warm)


def test_a_change_of_threads_is_said_where_the_key_has_their_number(data, teacher, plain, tmp_path, monkeypatch):
    """A teacher whose bits depend on the number of threads: after three steps there are other ones."""
    step, done, tried = StageTraining._step, [0], CachedTeacher._try

    def with_threads(self, batch):
        layout = tried(self, batch)
        self._threads = torch.get_num_threads()
        return layout

    def counted(self, batch):
        step(self, batch)
        done[0] += 1
        if done[0] == 3:
            monkeypatch.setattr(teacher_cache.torch, "get_num_threads", lambda: 64)

    monkeypatch.setattr(CachedTeacher, "_try", with_threads)
    monkeypatch.setattr(StageTraining, "_step", counted)
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job")
    assert same(student, plain) and not codes
    assert report["stored"] == 3 * BATCH and report["not_kept"] == report["misses"] - report["stored"]
    assert any("since the number of threads changed" in note for note in report["notes"])


def test_views_that_a_record_cannot_hold_exactly_are_counted_and_computed_again(data, teacher, tmp_path, monkeypatch):
    """The form of a record comes from noise, for which this teacher gives few digits; for most images it gives more."""
    forward, calls = FrozenTeacher.forward, [0]

    def few_digits_at_first(self, batch):
        calls[0] += 1
        logits = forward(self, batch).logits
        return View(logits.bfloat16().float() if calls[0] <= 1 + TRIED else logits)

    students = []
    for name, how in (("off", "off"), ("cold", "exact"), ("warm", "exact")):
        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(FrozenTeacher, "forward", few_digits_at_first)
            spec = spec_of(data, teacher, teacher_cache=how)
            student, report, _ = finish(spec, tmp_path / name, tmp_path / "cache")
        students.append(student)
        if how == "exact":
            assert report["stored"] < report["misses"] and report["not_kept"] > 0
            assert any("bfloat16 cannot hold" in note for note in report["notes"])
    assert same(*students[:2]) and same(*students[1:])


def test_what_finds_no_room_is_counted(data, teacher, tmp_path):
    _, report, _ = finish(spec_of(data, teacher), tmp_path / "job", tmp_path / "cache", max_bytes=5000)
    assert report["stored"] + report["not_kept"] == report["misses"]


def test_timings_count_the_look_ups_of_steps_as_caching_but_not_the_teacher(data, teacher, tmp_path, monkeypatch):
    """On a clock on which each pass of the teacher takes ten seconds, and each reading of the clock one."""
    now, forward = [0.0], FrozenTeacher.forward

    def read():
        now[0] += 1
        return now[0]

    def slow(self, batch):
        now[0] += 10
        return forward(self, batch)

    where, _ = workspace(tmp_path)
    spent = []
    cache = teacher_cache.in_front(prepare(spec_of(data, teacher), where), where, spent.append)
    monkeypatch.setattr(teacher_cache, "time", SimpleNamespace(monotonic=read))
    monkeypatch.setattr(FrozenTeacher, "forward", slow)
    prepared = prepare(spec_of(data, teacher), where)
    training_set, recipe = prepared.training_set(prepared.trials[0]), prepared.spec.training
    batches = cache.through(Batches(training_set, recipe, Views.of(recipe, 3), epoch=0))
    for batch in itertools.islice(batches, 2):
        cache(batch)
    # The first call tries the teacher on two pieces of noise; a pass that is timed reads the clock twice.
    assert spent == [10 * TRIED + 3 - 1, 3 - 1]
    cache.close()


def test_two_jobs_at_once_share_a_cache(data, teacher, plain, tmp_path, monkeypatch):
    """The second begins and ends in the middle of the first, which finds what it has stored at its next epoch."""
    cache, done, step = tmp_path / "cache", [0], StageTraining._step

    def with_another_job(self, batch):
        step(self, batch)
        done[0] += 1
        if done[0] == STEPS + 2:
            finish(spec_of(data, teacher), tmp_path / "other", cache)

    monkeypatch.setattr(StageTraining, "_step", with_another_job)
    student, report, codes = finish(spec_of(data, teacher), tmp_path / "job", cache)
    assert same(student, plain) and not codes and done[0] == 2 * EPOCHS * STEPS
    _, alone, _ = finish(spec_of(data, teacher), tmp_path / "alone")
    assert report["misses"] < alone["misses"]


@pytest.mark.parametrize("steps", [3, 6, 8])
def test_a_resumed_job_has_the_same_bits_with_any_cache(steps, data, teacher, plain, tmp_path, monkeypatch):
    where, stream = workspace(tmp_path / "stopped")
    done, step = [0], StageTraining._step

    def counted(self, batch):
        step(self, batch)
        done[0] += 1
        where.stop_requested = done[0] == steps

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "_step", counted)
        with pytest.raises(Stopped):
            run(spec_of(data, teacher), where)
    checkpoint = where.out / events(stream, "checkpoint")[-1]["path"]
    for name, cache in (("own", where.cache), ("none", tmp_path / "none")):
        onward, _ = workspace(tmp_path / name, cache)
        report = run(spec_of(data, teacher), onward, checkpoint)["teacher_cache"]
        assert same(plain, load_file(onward.out / "student.safetensors"))
        assert report["hits"] + report["misses"] == SEEN - steps * BATCH


def test_without_augmentation_the_teacher_runs_once_over_the_data(data, teacher, tmp_path, rows):
    spec = spec_of(data, teacher, augmentation={"name": "none"}, batch_size=36)
    _, report, _ = finish(spec, tmp_path / "job")
    assert (report["misses"], report["hits"]) == (108, 2 * 108)
    assert sum(rows) == 2 + TRIED * 36 + 108


def test_with_few_views_the_teacher_runs_once_for_each(data, teacher, tmp_path, rows):
    """Epochs take the views in turn. Boxes have numbers then, too."""
    augmentation = {"name": "random_resized_crop"}
    spec = {"augmentation": augmentation, "batch_size": 36, "epochs": 5, "teacher_cache": {"views": 2}}
    student, report, _ = finish(spec_of(data, teacher, **spec), tmp_path / "job", tmp_path / "cache")
    assert report["setting"] == {"views": 2} and (report["misses"], report["hits"]) == (2 * 108, 3 * 108)
    again, report, _ = finish(spec_of(data, teacher, **spec), tmp_path / "again", tmp_path / "cache")
    assert report["misses"] == 0 and same(student, again)
    _, report, _ = finish(spec_of(data, teacher, **spec, seed=1), tmp_path / "seed", tmp_path / "cache")
    assert report["misses"] == 2 * 108


@pytest.mark.parametrize(
    ("method", "training", "said"),
    [
        ("kd", {"mix": "mixup"}, "have no numbers"),
        ("kd", {"augmentation": {"name": "random_resized_crop"}}, "have no numbers"),
        ({"name": "attention", "mapping": "gradient"}, {}, "gradients or modules"),
        ("ofd", {}, "gradients or modules"),
    ],
)
def test_views_that_cannot_be_kept_are_computed_as_they_come(method, training, said, data, teacher, tmp_path, rows):
    _, report, codes = finish(spec_of(data, teacher, method, **training), tmp_path / "job")
    assert not report["used"] and not codes and any(said in note for note in report["notes"])
    assert set(rows) == {2, BATCH} and len(rows) == 1 + EPOCHS * STEPS
    assert entries(tmp_path / "job" / "cache") == []


def test_activations_that_are_too_large_are_not_kept(data, teacher, tmp_path, monkeypatch):
    from kdcore.cache import layout as view_layout

    monkeypatch.setattr(view_layout, "MOST_BYTES", 100)
    _, report, _ = finish(spec_of(data, teacher, "nst"), tmp_path / "job")
    assert not report["used"] and "the most is 100" in report["notes"][0]


@pytest.mark.parametrize("method", ["attention", "rkd", "crd", "fsp", [{"name": "kd"}, {"name": "attention"}]])
def test_small_activations_are_kept_with_the_logits(method, data, teacher, tmp_path):
    """Maps of attention, flows and embeddings, and what several methods need."""
    fields = {"student": "convnet8"} if method == "fsp" else {}
    if isinstance(method, list):
        spec = {how: job(data, teacher, method=method, baseline="none", training={"teacher_cache": how, "epochs": 3})
                for how in ("off", "exact")}  # fmt: skip
    else:
        spec = {how: method_job(method, data, teacher, baseline="none", **fields,
                                training={"teacher_cache": how, "epochs": 3}) for how in ("off", "exact")}  # fmt: skip
    off, _, _ = finish(spec["off"], tmp_path / "off")
    cold, first, _ = finish(spec["exact"], tmp_path / "cold", tmp_path / "cache")
    warm, second, codes = finish(spec["exact"], tmp_path / "warm", tmp_path / "cache")
    assert first["stored"] and second["misses"] == 0 and not codes
    assert same(off, cold) and same(off, warm)


class BesideEachOther(nn.Module):
    """Its answer for an image depends on the others of the batch."""

    def forward(self, images):
        return images.flatten(1)[:, :3] - images.flatten(1)[:, :3].mean(0)


def test_a_teacher_whose_rows_depend_on_their_batch_runs_on_whole_batches(data, teacher, tmp_path, monkeypatch, rows):
    from kdcore import models

    students, build = [], models.build
    for how in ("off", "exact"):
        rows.clear()
        where, _ = workspace(tmp_path / how)
        with monkeypatch.context() as patch:
            patch.setattr(
                models, "build", lambda name, *shape: BesideEachOther() if name == "convnet8" else build(name, *shape)
            )
            patch.setattr("kdcore.weights.load_into", lambda *_: None)
            report = run(spec_of(data, teacher, teacher_cache=how), where)["teacher_cache"]
        assert not report["used"] and "depend on the images beside it" in report["notes"][0]
        assert rows[-EPOCHS * STEPS :] == [BATCH] * EPOCHS * STEPS
        students.append(load_file(where.out / "student.safetensors"))
    assert same(*students)


def test_a_job_that_an_earlier_version_began_runs_its_teacher_on_whole_batches(data, teacher, tmp_path):
    where, _ = workspace(tmp_path)
    prepared = prepare(spec_of(data, teacher), where, computing=Computing("cpu", False, 1))
    assert teacher_cache.in_front(prepared, where) is None
    assert "earlier version" in teacher_cache.report(prepared, None)["notes"][0]


def test_the_key_tells_all_that_decides_the_outputs(data, teacher, tmp_path):
    other_data = write_arrays(tmp_path / "other.npz", train=150)
    other_teacher = write_teacher(tmp_path / "other.safetensors", seed=2)
    pool = write_pool(tmp_path / "pool.npz")

    def decided(data=data, teacher=teacher, computing=None, **fields):
        where, _ = workspace(tmp_path / "job", tmp_path / "cache")
        spec = job(data, teacher, method="kd", baseline="none", **fields)
        prepared = prepare(spec, where, computing=computing)
        return json.dumps(teacher_key.decides(prepared, where), sort_keys=True)

    own = decided(computing=Computing("cpu", False, 1, folded=True, convolutions=True))
    others = {
        "teacher": decided(teacher=other_teacher),
        "data": decided(data=other_data),
        "rows": decided(dataset={"source": f"file:{data}", "limit": 60}),
        "size": decided(dataset={"source": f"file:{data}", "image_size": 16}),
        "pool": decided(unlabelled={"source": f"file:{pool}"}),
        "augmentation": decided(training={"augmentation": {"name": "crop_flip", "padding": 2}}),
        "flip": decided(training={"augmentation": {"name": "crop_flip", "padding": 1, "flip": False}}),
        "normalization": decided(
            teacher=[{"checkpoint": f"file:{teacher}", "preprocessing": {"mean": [0.4], "std": [0.2]}}]
        ),
        "ensemble": decided(teacher=[{"checkpoint": f"file:{one}"} for one in (teacher, other_teacher)]),
        "precision": decided(training={"precision": "bf16"}),
        "folded": decided(computing=Computing("cpu", False, 1, folded=False, convolutions=True)),
        "convolutions": decided(computing=Computing("cpu", False, 1, folded=True, convolutions=False)),
    }
    assert own not in others.values() and len(set(others.values())) == len(others)
    # What only the student sees or does, and where a file lies, decides nothing.
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(teacher.read_bytes())
    assert own == decided(teacher=moved) == decided(training={"seed": 3, "epochs": 9, "batch_size": 20})
    assert own == decided(student="convnet8", temperature=2)


def test_other_weights_in_an_ensemble_and_other_temperatures_are_other_keys(data, teacher, tmp_path):
    other = write_teacher(tmp_path / "other.safetensors", seed=2)
    where, _ = workspace(tmp_path / "job")

    def decided(weight, temperature):
        each = [{"checkpoint": f"file:{teacher}"}, {"checkpoint": f"file:{other}", "weight": weight}]
        spec = job(data, each, method="kd", baseline="none", temperature=temperature)
        return json.dumps(teacher_key.decides(prepare(spec, where), where), sort_keys=True)

    assert len({decided(*pair) for pair in ((1, 4), (2, 4), (1, 3))}) == 3


def test_the_key_of_a_program_names_its_threads(data, teacher, tmp_path, monkeypatch):
    """A program has those that it was opened with, so that a trial on one thread tells nothing."""
    where, _ = workspace(tmp_path / "job")
    prepared = prepare(spec_of(data, teacher), where)
    assert teacher_key.decides(prepared, where)["threads"] is None
    monkeypatch.setattr(teacher_key, "Program", type(prepared.teacher.members[0].network))
    assert teacher_key.decides(prepared, where)["threads"] == prepared.computing.threads == 1


def test_cpu_kind_names_this_cpu_and_the_instructions_that_torch_uses(monkeypatch):
    kind = teacher_key.cpu_kind()
    assert torch.backends.cpu.get_cpu_capability() in kind and kind == teacher_key.cpu_kind()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert teacher_key.cpu_kind() != kind
