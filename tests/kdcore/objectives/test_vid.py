import itertools
import math

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives.vid import Regressor, VariationalInformation, vid_loss
from kdcore.spec import methods
from tests.kdcore.objectives.lessons import SETTING, Classroom, lesson, maps, parameters

TAPS = ({"student": "early", "teacher": "early"}, {"student": "late", "teacher": "late"})


def objective(*taps) -> VariationalInformation:
    return VariationalInformation(methods.Vid(taps=taps or TAPS), SETTING)


def naive(mean, variance, teacher) -> float:
    n, c, h, w = mean.shape
    total = 0.0
    for i, j, y, x in itertools.product(range(n), range(c), range(h), range(w)):
        gap = mean[i, j, y, x].item() - teacher[i, j, y, x].item()
        total += (gap**2 / variance[j].item() + math.log(variance[j].item())) / 2
    return total / (n * c * h * w)


def test_value_worked_out_by_hand():
    """Gaps of 2 and 0 under variances 2 and 1: ½·(4/2 + ln 2) and ½·(0 + ln 1), then the mean of the two channels."""
    mean, teacher = torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1), torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1)
    value = vid_loss(mean, torch.tensor([2.0, 1.0]), teacher)
    assert value.item() == pytest.approx((2 + math.log(2)) / 4)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_it_is_the_sum_written_out(shape, dtype, close):
    mean, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    variance = maps(shape[1], seed=2, dtype=dtype).exp()
    assert vid_loss(mean, variance, teacher).item() == pytest.approx(naive(mean, variance, teacher), abs=close)


def test_it_is_the_likelihood_of_a_normal_distribution_but_for_a_constant():
    mean, variance, teacher = maps(2, 3, 4, 4), maps(3, seed=2).exp(), maps(2, 3, 4, 4, seed=1)
    likelihood = torch.distributions.Normal(mean, variance.sqrt()[:, None, None]).log_prob(teacher).mean()
    expected = -likelihood - math.log(2 * math.pi) / 2
    assert vid_loss(mean, variance, teacher).item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_sure_and_right_guess_is_worth_less_than_zero():
    same = maps(2, 3, 4, 4)
    assert vid_loss(same, torch.full((3,), 0.1, dtype=torch.float64), same).item() == pytest.approx(math.log(0.1) / 2)


def test_gradients_are_right_and_none_reaches_the_teacher():
    mean, unbounded = maps(2, 3, 2, 3).requires_grad_(), maps(3, seed=2).requires_grad_()
    teacher = maps(2, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: vid_loss(m, v.exp(), teacher.detach()), (mean, unbounded))
    vid_loss(mean, unbounded.exp(), teacher).backward()
    assert mean.grad.abs().sum() > 0 and unbounded.grad.abs().sum() > 0 and teacher.grad is None


def test_the_variance_starts_at_five_and_is_never_below_its_floor():
    guess = Regressor(2, 3)
    _, variance = guess(torch.zeros(1, 2, 1, 1))
    assert variance.tolist() == pytest.approx([5.0] * 3, rel=1e-6)
    torch.nn.init.constant_(guess.unbounded, -1e4)
    _, variance = guess(torch.zeros(1, 2, 1, 1))
    assert variance.tolist() == pytest.approx([1e-5] * 3)


def test_a_regressor_has_three_convolutions_without_bias_and_a_variance_for_each_channel():
    assert parameters(Regressor(3, 5)) == 3 * 5 + 5 * 5 + 5 * 5 + 5


def test_training_changes_the_student_and_all_regressors_and_no_teacher():
    room, vid = Classroom(), objective()
    assert vid.student_taps == vid.teacher_taps == ("early", "late")
    room.build(vid)
    assert parameters(vid) == (3 * 5 + 2 * 25 + 5) + (4 * 6 + 2 * 36 + 6)
    assert room.changed_by_training(vid) == room.students() | {f"objective.{n}" for n, _ in vid.named_parameters()}


def test_the_losses_of_the_taps_are_summed():
    room, both, early, late = Classroom(), objective(), objective(TAPS[0]), objective(TAPS[1])
    for vid in (both, early, late):
        room.build(vid)
    early.guesses[0], late.guesses[0] = both.guesses[0], both.guesses[1]
    seen = room.lesson()
    assert both(seen).item() == pytest.approx((early(seen) + late(seen)).item())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (maps(1, 1, 1, 1), maps(1, 1, 1, 1, seed=1)),
        (maps(2, 3, 7, 5), maps(2, 4, 3, 5, seed=1)),
        (maps(2, 3, 3, 2), maps(2, 4, 6, 4, seed=1)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)),
    ],
    ids=["one of each", "odd and larger", "smaller", "all zero"],
)
def test_value_and_gradient_are_finite(student, teacher):
    student = student.clone().requires_grad_()
    vid, seen = objective(TAPS[0]), lesson({"early": student}, {"early": teacher})
    vid.build(seen)
    value = vid(seen)
    value.backward()
    assert value.shape == () and value.isfinite() and student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in vid.parameters())


def test_a_state_that_is_put_back_gives_the_same_loss():
    room, vid, again = Classroom(), objective(), objective()
    room.build(vid)
    room.changed_by_training(vid)
    room.build(again)
    again.load_state_dict(vid.state_dict())
    assert torch.equal(again(room.lesson()), vid(room.lesson()))


def test_a_tap_that_is_no_map_is_refused_by_name():
    vid = objective({"student": "embedding", "teacher": "late"})
    with pytest.raises(SpecInvalid, match="tap 'embedding' gives 4 for each image"):
        Classroom().build(vid)
