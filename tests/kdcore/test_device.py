import pytest
import torch

from base.errors import SpecInvalid
from kdcore import device
from kdcore.spec import Training


def test_choose_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose(Training()).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose(Training()).type == "cuda"
    assert device.choose(Training(device="cpu")).type == "cpu"


def test_choose_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecInvalid, match=r"training\.device"):
        device.choose(Training(device="cuda"))


@pytest.mark.parametrize(("precision", "bf16"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_a_cpu_computes_in_bf16_only_when_asked(precision, bf16):
    assert device.bf16(Training(precision=precision), torch.device("cpu")) is bf16


def test_make_exact_the_seed_makes_the_same_numbers():
    device.make_exact(3)
    once = torch.rand(3)
    device.make_exact(3)
    assert torch.equal(torch.rand(3), once)


def test_make_exact_new_tensors_are_not_filled_for_nothing():
    device.make_exact(0)
    assert not torch.empty(1000).isnan().all()


def test_choose_computing_a_graph_is_refused_on_a_cpu(monkeypatch):
    with pytest.raises(SpecInvalid, match=r"training\.step is 'graph'.*CPU") as refused:
        device.choose_computing(Training(step="graph", device="cpu"))
    assert "'eager'" in str(refused.value.hint)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert device.choose_computing(Training(step="graph")).step == "graph"


@pytest.mark.parametrize(("threads", "student", "teacher"), [(1, 1, 1), (2, 1, 1), (5, 3, 2), (8, 4, 4)])
def test_computing_divides_the_threads_between_student_and_teacher(threads, student, teacher):
    computing = device.Computing("cpu", bf16=False, threads=threads, overlap=True)
    assert (computing.student_threads, computing.teacher_threads) == (student, teacher)


def test_choose_computing_a_teacher_runs_ahead_on_a_cpu_only(monkeypatch):
    assert device.choose_computing(Training(device="cpu", overlap=True)).overlap
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert not device.choose_computing(Training(overlap=True)).overlap
