from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base import cores
from base.errors import SpecInvalid
from kdcore import device, kernels
from kdcore.device import Computing, LoadWatch
from kdcore.spec import Training


def test_choose_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose(Training()).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose(Training()).type == "cuda"
    assert device.choose(Training(device="cpu")).type == "cpu"


def test_choose_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecInvalid, match="'cuda' is asked for"):
        device.choose(Training(device="cuda"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("precision", "bf16"), [("auto", None), ("fp32", False), ("bf16", True)])
def test_a_cpu_computes_in_bf16_when_asked_and_where_it_has_it(monkeypatch, precision, bf16, native):
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: native)
    expected = native if bf16 is None else bf16
    assert device.bf16(Training(precision=precision), torch.device("cpu")) is expected


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 xsaves\n", True),
        ("flags\t: fpu amx_tile amx_bf16\n", True),
        ("flags\t: fpu avx2 avx512f\nbugs\t: bf16\n", False),
        ("Features\t: fp asimd i8mm bf16 sve\n", True),
        ("Features\t: fp asimd\n", False),
        ("", False),
        (None, False),
    ],
)
def test_cpu_has_bf16_by_the_flags_of_the_kernel(monkeypatch, tmp_path: Path, text, has):
    monkeypatch.setattr(cores, "CPUS", tmp_path / "cpuinfo")
    if text is not None:
        cores.CPUS.write_text(text)
    assert device.cpu_has_bf16() is has
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not device.cpu_has_bf16()


@pytest.fixture
def four_cores(monkeypatch):
    """Four cores, no number of threads in the environment, and nobody else."""
    monkeypatch.setattr(cores, "_allowed", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "quota", lambda *_: None)
    monkeypatch.setattr(cores, "busy", lambda: 0.0)
    for name in (*cores.THREADS, cores.AT_MOST):
        monkeypatch.delenv(name, raising=False)
    # In bfloat16 too, which oneDNN has for CPUs with AVX-512 alone.
    monkeypatch.setattr(device, "can_fold", lambda bf16: True)


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("environment", "asked", "busy", "threads", "why"),
    [
        ({}, None, 0.0, 4, "its share of the cores"),
        ({}, None, 1.2, 3, "1 of 4 cores are busy"),
        ({}, None, 9.0, 1, "3 of 4 cores are busy"),
        ({cores.AT_MOST: "2", "OMP_NUM_THREADS": "2"}, None, 1.0, 2, "its share of the cores"),
        ({cores.AT_MOST: "2", "OMP_NUM_THREADS": "2"}, None, 3.0, 1, "3 of 4 cores are busy"),
        ({cores.AT_MOST: "1", "OMP_NUM_THREADS": "1"}, None, 3.0, 1, "its share of the cores"),
        ({"OMP_NUM_THREADS": "3"}, None, 4.0, 3, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "3"}, 2, 4.0, 2, "training.threads"),
        ({}, 4, 4.0, 4, "training.threads"),
        ({}, 64, 0.0, 4, "training.threads is 64, of 4 cores"),
        ({"OMP_NUM_THREADS": "64"}, None, 0.0, 4, "OMP_NUM_THREADS is 64, of 4 cores"),
    ],
)
def test_choose_threads_keeps_to_a_number_that_is_set_and_to_what_is_free(
    monkeypatch, environment, asked, busy, threads, why
):
    monkeypatch.setattr(cores, "busy", lambda: busy)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert device.choose_threads(asked) == (threads, why)
    assert device.threads_are_asked(Training(threads=asked)) is not any(word in why for word in ("share", "busy"))


FUSED = kernels.Support(True, "fused here", convolutions=frozenset({torch.bfloat16, torch.float32}))
BEGUN = Computing(
    "cpu", True, 2, kernels=True, convolutions=True, folded=True, why="its share of the cores", note=FUSED.note
)
HERE = Path("cache")


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(kernels, "enable", lambda *_, **__: FUSED)


@pytest.mark.usefixtures("four_cores", "fused")
def test_resume_computes_as_the_job_began(monkeypatch):
    monkeypatch.setattr(cores, "busy", lambda: 4.0)
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert device.resume(BEGUN, Training(device="cpu"), HERE) == (BEGUN, "")


@pytest.mark.usefixtures("four_cores", "fused")
def test_resume_says_what_this_machine_does_not_have(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here, changed = device.resume(BEGUN, Training(device="cpu"), HERE)
    assert (here.threads, here.bf16, here.kernels, changed) == (1, True, True, "with 1 instead of 2 threads")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(cores, "_allowed", lambda: {0})
    here, changed = device.resume(Computing("cuda", True, 2), Training(device="cpu"), HERE)
    assert (here.device, here.threads) == ("cpu", 1)
    assert changed == "on cpu instead of cuda and with 1 instead of 2 threads"


@pytest.mark.usefixtures("four_cores")
def test_resume_says_that_the_fused_kernels_are_missing(monkeypatch):
    monkeypatch.setattr(kernels, "enable", lambda *_, **__: kernels.Support(False, "eager: no compiler"))
    here, changed = device.resume(BEGUN, Training(device="cpu"), HERE)
    assert (here.kernels, here.convolutions, here.folded, here.note) == (False, False, True, "eager: no compiler")
    assert changed == "without the fused kernels (eager: no compiler)"


@pytest.mark.usefixtures("four_cores")
def test_resume_says_that_the_convolutions_are_missing(monkeypatch):
    monkeypatch.setattr(kernels, "enable", lambda *_, **__: kernels.Support(True, "norms here"))
    here, changed = device.resume(BEGUN, Training(device="cpu"), HERE)
    assert (here.kernels, here.convolutions, here.note) == (True, False, "norms here")
    assert changed == "with other 3 × 3 convolutions"


@pytest.mark.usefixtures("four_cores")
def test_resume_says_that_torch_the_cpu_or_the_code_of_the_kernels_are_others(monkeypatch):
    """A worker on another kind of machine, or of another version, takes the job over."""
    here = replace(FUSED, code="kernels-2")
    monkeypatch.setattr(kernels, "enable", lambda *_, **__: here)
    computing = device.begin(Training(device="cpu"), HERE, (2, ""))
    kind = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    assert computing.arithmetic == f"{kind}, kernels-2"
    assert device.resume(computing, Training(device="cpu"), HERE) == (computing, "")
    begun = replace(computing, arithmetic="torch 2.0, AVX2, kernels-1")
    assert device.resume(begun, Training(device="cpu"), HERE) == (
        computing, f"by {kind}, kernels-2 instead of torch 2.0, AVX2, kernels-1",
    )  # fmt: skip
    assert device.resume(replace(begun, arithmetic=""), Training(device="cpu"), HERE)[1] == ""
    eager = device.begin(Training(device="cpu", kernels="eager"), HERE, (2, ""))
    assert eager.arithmetic == kind and device.resume(eager, Training(device="cpu"), HERE) == (eager, "")


@pytest.mark.usefixtures("four_cores")
def test_resume_a_job_that_began_with_other_convolutions_keeps_them(monkeypatch):
    """As every job of an earlier version did."""
    asked = []
    support = kernels.Support(True, "norms here")
    monkeypatch.setattr(kernels, "enable", lambda _, convolutions: asked.append(convolutions) or support)
    begun = replace(BEGUN, convolutions=False, note="norms here")
    assert device.resume(begun, Training(device="cpu"), HERE) == (begun, "") and asked == [False]


@pytest.mark.usefixtures("four_cores")
def test_resume_keeps_the_reason_why_a_job_began_without_the_fused_kernels(monkeypatch):
    """Also where there are some: the job computes as it began."""
    monkeypatch.setattr(kernels, "enable", lambda *_, **__: FUSED)
    begun = replace(BEGUN, kernels=False, convolutions=False, note="eager: no compiler")
    assert device.resume(begun, Training(device="cpu"), HERE) == (begun, "")


@pytest.mark.usefixtures("four_cores")
def test_resume_a_graph_of_a_gpu_is_eager_on_a_cpu():
    begun = Computing("cuda", True, 2, step="graph")
    here, changed = device.resume(begun, Training(device="auto", step="graph"), HERE)
    assert (here.device, here.step, changed) == ("cpu", "eager", "on cpu instead of cuda")


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("option", "cache", "own"), [("auto", HERE, True), ("auto", None, False), ("eager", HERE, False)]
)
def test_begin_takes_the_kernels_that_the_recipe_and_the_machine_allow(option, cache, own):
    computing = device.begin(Training(device="cpu", kernels=option), cache, (2, ""))
    assert (computing.kernels, computing.note) == (own, FUSED.note if own else "")
    assert computing.folded is (option == "auto")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_begin_and_resume_ask_for_our_own_convolutions_in_the_precision_of_the_job(monkeypatch, precision):
    """A CPU with AVX2 alone has those in float32."""
    support = kernels.Support(True, "fused here", convolutions=frozenset({torch.float32}))
    monkeypatch.setattr(kernels, "enable", lambda *_, **__: support)
    training = Training(device="cpu", precision=precision, threads=1)
    computing = device.begin(training, HERE, (1, ""))
    assert computing.convolutions is (precision == "fp32")
    here, changed = device.resume(replace(computing, convolutions=True), training, HERE)
    assert here.convolutions is (precision == "fp32")
    assert changed == ("" if precision == "fp32" else "with other 3 × 3 convolutions")


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("precision", "bf16"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_resume_a_job_of_an_earlier_version_computes_as_that_one_did(monkeypatch, precision, bf16):
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    here, changed = device.resume(None, Training(device="cpu", precision=precision), HERE)
    assert (here.bf16, here.kernels, here.convolutions, here.folded, here.step, here.overlap, changed) == (
        bf16, False, False, False, "eager", False, "",
    )  # fmt: skip
    assert here.threads == torch.get_num_threads()


@pytest.fixture
def load(monkeypatch):
    """The cores in use by others, which a test sets; and the numbers of threads that were set."""
    state = {"in_use": 0.0, "at": 0.0, "set": []}

    def now():
        return cores.CpuTime(state["at"], state["in_use"] * state["at"], 0, 0)

    monkeypatch.setattr(cores, "_allowed", lambda: {0, 1})
    monkeypatch.setattr(cores.CpuTime, "now", now)
    monkeypatch.setattr(cores.CpuTime, "others_since", lambda *_: state["in_use"])
    monkeypatch.setattr(device.time, "monotonic", lambda: state["at"])
    monkeypatch.setattr(torch, "set_num_threads", state["set"].append)
    return state


def steps(watch: LoadWatch, load, seconds: float) -> list[int]:
    """The numbers of threads that a watch sets in so many seconds, with two steps in each."""
    found = []
    for _ in range(int(seconds * 2)):
        load["at"] += 0.5
        found.append(watch.after_step())
    return [number for number in found if number is not None]


def test_load_watch_takes_fewer_threads_beside_a_neighbour_and_takes_them_back(load):
    watch = LoadWatch(2, adapts=True)
    assert steps(watch, load, 60) == []
    load["in_use"] = 1.0
    assert steps(watch, load, device.WINDOW_S - 0.5) == []
    assert steps(watch, load, 60) == [1]
    load["in_use"] = 0.0
    assert steps(watch, load, device.WINDOW_S * (device.QUIET_WINDOWS - 1)) == []
    load["in_use"] = 1.0
    assert steps(watch, load, 2 * device.WINDOW_S) == []
    load["in_use"] = 0.0
    assert steps(watch, load, device.WINDOW_S * (device.QUIET_WINDOWS + 1)) == [2]
    assert load["set"] == [1, 2]


@pytest.mark.parametrize(("threads", "adapts"), [(1, True), (2, False)])
def test_load_watch_leaves_a_number_that_is_set_or_the_smallest(load, threads, adapts):
    watch = LoadWatch(threads, adapts=adapts)
    load["in_use"] = 2.0
    assert steps(watch, load, 30) == load["set"] == []


def test_computing_in_words_names_what_was_chosen():
    assert str(BEGUN).startswith("cpu, 2 threads (its share of the cores), bf16, kernels: fused here, folded teacher, ")
    assert str(Computing("cuda", False, 1, step="graph")).startswith("cuda, 1 thread, fp32, CUDA graph, allocator: ")


def test_make_exact_the_seed_makes_the_same_numbers():
    device.make_exact(3)
    once = torch.rand(3)
    device.make_exact(3)
    assert torch.equal(torch.rand(3), once)


def test_make_exact_new_tensors_are_not_filled_for_nothing():
    device.make_exact(0)
    assert not torch.empty(1000).isnan().all()


def test_begin_a_graph_is_refused_on_a_cpu(monkeypatch):
    with pytest.raises(SpecInvalid, match=r"training\.step is 'graph'.*CPU") as refused:
        device.begin(Training(step="graph", device="cpu"), None)
    assert "'eager'" in str(refused.value.hint)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    computing = device.begin(Training(step="graph"), None)
    assert (computing.step, computing.arithmetic) == ("graph", f"torch {torch.__version__}, NVIDIA H200")


@pytest.mark.parametrize(("threads", "student", "teacher"), [(1, 1, 1), (2, 1, 1), (5, 3, 2), (8, 4, 4)])
def test_computing_divides_the_threads_between_student_and_teacher(threads, student, teacher):
    computing = device.Computing("cpu", bf16=False, threads=threads, overlap=True)
    assert (computing.student_threads, computing.teacher_threads) == (student, teacher)


def test_begin_a_teacher_runs_ahead_on_a_cpu_only(monkeypatch):
    assert device.begin(Training(device="cpu", overlap=True), None, (2, "")).overlap
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert not device.begin(Training(overlap=True), None, (2, "")).overlap
