"""What is measured of a file, and what becomes of one that cannot be run."""

import pytest
import torch

from base.files import write_text
from kdcore.data.images import Images
from kdcore.exports import measuring, safetensors
from kdcore.exports.measuring import FileFailed
from kdcore.exports.student_source import student_source
from kdcore.spec import ExportOptions
from tests.kdcore.exports.making import answered, data, images, student

OPTIONS = ExportOptions(batch_size=4)


@pytest.fixture
def one():
    return student("convnet4")


def measured(one, folder, **changes):
    """A weights file in plain PyTorch, on test images of which `labels` are right."""
    path, source = folder / "student.safetensors", folder / "student.py"
    if not path.exists():
        safetensors.write(one, path)
    write_text(source, changes.pop("source", student_source(one)))
    pixels = images(10)
    labels = changes.pop("labels", answered(one, pixels).argmax(1))
    options = changes.pop("options", OPTIONS)
    return measuring.measure("torch", path, source, one, options, Images(pixels, labels), **changes)


def test_measure_counts_the_images_that_the_file_is_right_on(one, tmp_path):
    """Of ten images three have another label, and the file agrees with the student on all."""
    labels = answered(one, images(10)).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3
    calls = []
    found = measured(one, tmp_path, labels=labels, working=lambda done, total: calls.append((done, total)))
    assert (found.accuracy, found.agreement, found.images) == (0.7, 1.0, 10)
    assert found.difference < 1e-5
    assert calls == [(1, 3), (2, 3), (3, 3)], "a sign of life after each batch of four"


def test_measure_a_file_that_cannot_be_loaded_fails_with_its_last_line_and_no_path(one, tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(FileFailed, match="JSONDecodeError") as caught:
        measured(one, tmp_path)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)


def test_measure_a_file_that_fails_at_a_batch_size_fails_with_its_last_line(one, tmp_path):
    broken = student_source(one) + "\n\nload_it = load\ndef load(path):\n    network = load_it(path)\n"
    broken += "    network.register_forward_pre_hook(lambda _, given: [1 / (len(given[0]) - 2)] and None)\n"
    broken += "    return network\n"
    with pytest.raises(FileFailed, match=r"^ZeroDivisionError: division by zero$"):
        measured(one, tmp_path, source=broken)


NO_MEMORY = "can't allocate memory: you tried to allocate 4294967296 bytes"


def short_of_memory(one, most):
    """A `student.py` whose network has memory for so many images at a time."""
    broken = student_source(one) + "\n\nload_it = load\ndef load(path):\n    network = load_it(path)\n"
    broken += "    def check(_, given):\n"
    broken += f"        if len(given[0]) > {most}:\n            raise RuntimeError({NO_MEMORY!r})\n"
    return broken + "    network.register_forward_pre_hook(check)\n    return network\n"


@pytest.mark.parametrize(("most", "batches", "left_out"), [(5, [1, 4], [16]), (2, [1], [16, 4])])
def test_measure_takes_a_smaller_batch_where_a_large_one_needs_too_much_memory(one, tmp_path, most, batches, left_out):
    """The file is good: all test images, and the first logits, are computed in batches that fit."""
    options, calls = ExportOptions(batch_size=16), []
    source = short_of_memory(one, most)
    found = measured(one, tmp_path, source=source, options=options, working=lambda *of: calls.append(of))
    assert [latency["batch"] for latency in found.latency] == batches and found.batches_left_out == left_out
    assert (found.accuracy, found.agreement, found.images) == (1.0, 1.0, 10) and found.difference < 1e-5
    assert calls[-1] == (-(-10 // batches[-1]),) * 2


def test_measure_a_file_that_needs_too_much_memory_for_one_image_fails(one, tmp_path):
    with pytest.raises(FileFailed, match=r"more memory than the \d+\.\d GB .* with 1 image at a time"):
        measured(one, tmp_path, source=short_of_memory(one, 0))


def test_reference_is_computed_once_for_all_files(one, monkeypatch):
    first = measuring.reference(one, data(one, images()).test, 8)
    monkeypatch.setattr(measuring, "_reference", None)
    assert measuring.reference(one, data(one, images()).test, 8) is first
    assert first.accuracy == 1.0 and torch.equal(first.rows, torch.arange(24))
    torch.testing.assert_close(first.first, answered(one, images())[:13])


def test_reference_of_a_slow_student_is_of_evenly_spaced_images(one, monkeypatch):
    """A batch of 2 takes a second, and there are four: 8 of 24 images."""
    seconds = iter([0.0, 1.0])
    monkeypatch.setattr(measuring.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(measuring, "REFERENCE_S", 4.0)
    found = measuring.reference(one, data(one, images()).test, 2)
    assert found.rows.tolist() == [0, 3, 7, 10, 13, 16, 20, 23] and found.accuracy == 1.0


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(13, 32, [1, 2, 3, 7]), (5, 32, [1, 2, 2]), (1, 32, [1]), (13, 4, [1, 2, 3, 4, 3]), (3, 1, [1, 1, 1])],
)
def test_sizes_of_few_images_or_small_batches_are_cut(count, most, sizes):
    assert measuring._sizes(count, most) == sizes


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [
        ("x86_64", {"avx2", "fma"}, True),
        ("x86_64", {"avx512f", "avx512bw"}, True),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("x86_64", {"avx512f", "avx512_vnni"}, False),
        ("AMD64", set(), True),
        ("aarch64", {"asimd"}, False),
        ("arm64", set(), False),
    ],
)
def test_int8_overflows_on_x86_without_vnni(machine, flags, overflows, monkeypatch):
    monkeypatch.setattr(measuring.platform, "machine", lambda: machine)
    monkeypatch.setattr(measuring.cores, "flags", lambda: flags)
    assert measuring.int8_overflows() is overflows


def test_child_has_the_allocator_of_users(one, tmp_path, monkeypatch):
    """OpenVINO ends where jemalloc is preloaded, as a worker does where it is installed."""

    class Started(Exception):
        pass

    def start(*_, env, **__):
        raise Started(env)

    for name in measuring.ALLOCATION:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(measuring.subprocess, "Popen", start)
    with pytest.raises(Started) as started:
        measured(one, tmp_path)
    (environment,) = started.value.args
    assert "PATH" in environment and not {*measuring.ALLOCATION} & {*environment}
