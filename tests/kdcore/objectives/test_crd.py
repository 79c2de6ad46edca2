import math

import pytest
import torch

from kdcore.objectives import crd
from kdcore.objectives.crd import ContrastiveRepresentation, crd_nce_loss, crd_scores
from kdcore.objectives.objective import Setting
from kdcore.spec.methods.relations import Crd
from tests.kdcore.objectives.lessons import maps
from tests.kdcore.objectives.two_networks import BODY, EMBEDDING, LABELS, SETTING, NoHostReads, Trial


def test_the_loss_worked_out_by_hand():
    """One negative of four images: noise expects 1/4. A true score of 3/4 is believed by 3/4, a false one of 1/4 is
    taken for noise by 1/2."""
    scores = torch.tensor([[3 / 4, 1 / 4]], dtype=torch.float64)
    assert crd_nce_loss(scores, data_size=4).item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2), abs=1e-6)


def test_a_score_worked_out_by_hand():
    embedding, memory = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.0, 1.0]])
    scores = crd_scores(embedding, memory, torch.tensor([[2, 0]]), temperature=0.5)
    assert scores.tolist() == [pytest.approx([math.exp(6), math.exp(4)])]


def naive_loss(scores: torch.Tensor, size: int) -> float:
    total, (batch, columns) = 0.0, scores.shape
    noise = (columns - 1) / size
    for true, *false in scores.tolist():
        total -= math.log(true / (true + noise + 1e-7))
        total -= sum(math.log(noise / (score + noise + 1e-7)) for score in false)
    return total / batch


@pytest.mark.parametrize(("batch", "negatives", "size"), [(1, 1, 2), (4, 7, 100), (3, 50, 20)])
def test_the_loss_agrees_with_plain_loops(batch, negatives, size):
    scores = maps(batch, 1 + negatives).exp() / size
    assert crd_nce_loss(scores, data_size=size).item() == pytest.approx(naive_loss(scores, size), rel=1e-9)
    assert crd_nce_loss(scores.float(), data_size=size).item() == pytest.approx(naive_loss(scores, size), rel=1e-5)


def test_the_gradient_of_the_loss_is_right():
    scores = (maps(3, 6).exp() / 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crd_nce_loss(x, data_size=10), scores)


def test_a_true_score_that_rounds_to_zero_costs_much_and_not_infinitely():
    scores = torch.tensor([[0.0, 1e30]], requires_grad=True)
    value = crd_nce_loss(scores, data_size=10)
    value.backward()
    assert 80 < value.item() < 200 and scores.grad.isfinite().all()


@pytest.mark.parametrize("whole", [True, False], ids=["matrix product", "fetched rows"])
def test_both_ways_of_scoring_agree_with_plain_loops(whole, monkeypatch):
    monkeypatch.setattr(crd, "_PRODUCT_PAYS", 1000 if whole else 0)
    embedding, memory = maps(3, 4).requires_grad_(), maps(9, 4, seed=1)
    rows = torch.tensor([[0, 5, 5, 8], [1, 2, 3, 4], [8, 0, 0, 0]])
    scores = crd_scores(embedding, memory, rows, temperature=0.7)
    by_loops = [
        [math.exp(sum(e * m for e, m in zip(sample, memory[row].tolist(), strict=True)) / 0.7) for row in own]
        for sample, own in zip(embedding.tolist(), rows.tolist(), strict=True)
    ]
    assert scores.tolist() == [pytest.approx(row, rel=1e-9) for row in by_loops]
    assert torch.autograd.gradcheck(lambda x: crd_scores(x, memory, rows, temperature=0.7), embedding)


@pytest.mark.parametrize("whole", [True, False], ids=["matrix product", "fetched rows"])
def test_the_gradient_is_that_of_the_memory_as_it_was(whole, monkeypatch):
    monkeypatch.setattr(crd, "_PRODUCT_PAYS", 1000 if whole else 0)
    memory, rows = maps(9, 4, seed=1), torch.tensor([[0, 5], [1, 2]])
    kept, moved = maps(2, 4).requires_grad_(), maps(2, 4).requires_grad_()
    crd_scores(kept, memory, rows, temperature=1).sum().backward()
    scores = crd_scores(moved, memory, rows, temperature=1)
    memory.zero_()
    scores.sum().backward()
    assert moved.grad.equal(kept.grad)


def trial(setting: Setting = SETTING, **options: float) -> Trial:
    return Trial(ContrastiveRepresentation(Crd(tap=EMBEDDING, **{"width": 6, "negatives": 20, **options}), setting))


def negatives_of(built: Trial, row: int, draws: int = 200) -> set[int]:
    """The training rows that are drawn against one."""
    objective = built.objective
    row_at = {place: row for row, place in enumerate(objective.place.tolist())}
    places = objective._negatives(objective.place[torch.tensor([row] * draws)])
    return {row_at[place] for place in places.flatten().tolist()}


@pytest.mark.parametrize("row", range(9))
def test_negatives_are_all_training_images_of_other_classes(row):
    """Row 9 is of class 1 too, but held out."""
    assert negatives_of(trial(), row) == {other for other in range(9) if LABELS[other] != LABELS[row]}


def test_negatives_are_drawn_evenly():
    objective = trial(negatives=8000).objective
    counts = objective._negatives(objective.place[:1]).flatten().bincount(minlength=9)
    assert sorted(counts.tolist())[:3] == [0, 0, 0]
    assert all(1200 < count < 1470 for count in sorted(counts.tolist())[3:])


def with_labels(*labels: int) -> Setting:
    return Setting(
        temperature=None, num_classes=3, epochs=1, labels=torch.tensor(labels), rows=torch.arange(len(labels))
    )


def test_an_unknown_label_has_all_others_for_negatives_and_is_one_of_all():
    built = trial(with_labels(0, -1, 0, 1, -1, 1, 1, 0))
    assert negatives_of(built, 1) == {0, 2, 3, 4, 5, 6, 7}
    assert negatives_of(built, 0) == {1, 3, 4, 5, 6}


def test_a_single_class_is_drawn_from_whole():
    assert negatives_of(trial(with_labels(*[2] * 8)), 3) == set(range(8))


def test_a_single_unknown_image_is_its_own_negative():
    setting = Setting(None, num_classes=3, epochs=1, labels=torch.full((8,), -1), rows=torch.tensor([3]))
    assert negatives_of(trial(setting), 3) == {3}


def test_held_out_rows_have_no_memory():
    objective = trial().objective
    assert len(objective.student_memory) == len(objective.teacher_memory) == 9
    assert sorted(objective.place.tolist()) == list(range(10)) and objective.place[9] == 9


def test_what_is_built_has_the_papers_size_and_spread():
    objective = trial(width=8).objective
    assert (objective.needs.student_taps, objective.needs.teacher_taps) == (("fc@in",), ("head@in",))
    assert sum(p.numel() for p in objective.parameters()) == (4 + 1) * 8 + (7 + 1) * 8
    for memory in (objective.student_memory, objective.teacher_memory):
        assert memory.abs().max().item() == pytest.approx(math.sqrt(3 / 8), rel=0.1)
        assert memory.abs().max().item() <= math.sqrt(3 / 8)
    assert objective.student_Z == objective.teacher_Z == 0


def by_plain_loops(built: Trial, rows: list[int], negatives: torch.Tensor) -> float:
    """The whole loss of a first step, from the embeddings and memories as they are."""
    objective, lesson = built.objective, built.lesson(rows)
    student = objective.student_embedding(lesson.student.taps["fc@in"])
    teacher = objective.teacher_embedding(lesson.teacher.taps["head@in"])
    place, total = objective.place.tolist(), 0.0
    for side, other in ((student, objective.teacher_memory), (teacher, objective.student_memory)):
        memory, unit = other.tolist(), [[v / math.hypot(*row) for v in row] for row in side.tolist()]
        scores = [
            [math.exp(sum(e * m for e, m in zip(embedding, memory[j], strict=True)) / 0.07) for j in (place[row], *own)]
            for embedding, row, own in zip(unit, rows, negatives.tolist(), strict=True)
        ]
        z = sum(map(sum, scores)) / (len(rows) * len(scores[0])) * len(memory)
        total += naive_loss(torch.tensor(scores, dtype=torch.float64) / z, len(memory))
    return total


def test_a_first_step_agrees_with_plain_loops(monkeypatch):
    built = trial(negatives=5)
    negatives = torch.tensor([[4, 5, 6, 7, 8], [0, 1, 2, 8, 8], [0, 0, 1, 3, 4]])
    monkeypatch.setattr(built.objective, "_negatives", lambda places: negatives)
    by_loops = by_plain_loops(built, [1, 4, 7], negatives)
    assert built.objective(built.lesson([1, 4, 7])).item() == pytest.approx(by_loops, rel=1e-5)


def test_both_directions_are_observed():
    built = trial()
    value = built.objective(built.lesson([1, 4, 7]))
    assert set(built.objective.observed) == {"crd/student", "crd/teacher"}
    assert sum(built.objective.observed.values()).item() == pytest.approx(value.item())


def embedded(built: Trial, rows: list[int]) -> dict[str, torch.Tensor]:
    lesson = built.lesson(rows)
    student = built.objective.student_embedding(lesson.student.taps["fc@in"])
    teacher = built.objective.teacher_embedding(lesson.teacher.taps["head@in"])
    return {"student": torch.nn.functional.normalize(student), "teacher": torch.nn.functional.normalize(teacher)}


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_step_remembers_its_batch_and_nothing_else(side):
    built = trial(momentum=0.25)
    memory, rows = getattr(built.objective, f"{side}_memory"), [1, 4, 7]
    before, places = memory.clone(), built.objective.place[torch.tensor(rows)]
    expected = 0.25 * before[places] + 0.75 * embedded(built, rows)[side]
    built.objective(built.lesson(rows))
    assert torch.allclose(memory[places], torch.nn.functional.normalize(expected))
    untouched = torch.ones(9, dtype=torch.bool).index_fill(0, places, False)
    assert memory[untouched].equal(before[untouched])


def test_an_image_that_stands_twice_in_a_batch_is_remembered_by_its_mean():
    built = trial(momentum=0.5)
    lesson = built.lesson([1, 4, 1])
    lesson.student.taps["fc@in"][2] += 1
    sides = torch.nn.functional.normalize(built.objective.student_embedding(lesson.student.taps["fc@in"]))
    place = built.objective.place[1]
    expected = 0.5 * built.objective.student_memory[place] + 0.25 * (sides[0] + sides[2])
    built.objective(lesson)
    assert torch.allclose(built.objective.student_memory[place], torch.nn.functional.normalize(expected, dim=0))


def test_z_is_set_by_the_first_batch_and_stays():
    built = trial()
    built.objective(built.lesson([1, 4, 7]))
    first = built.objective.student_Z.clone(), built.objective.teacher_Z.clone()
    built.train([0, 2, 3], [5, 6, 8])
    assert (built.objective.student_Z, built.objective.teacher_Z) == first and min(first) > 0


def test_nothing_is_remembered_in_eval_mode():
    built = trial()
    built.objective.eval()
    before = {name: value.clone() for name, value in built.objective.state_dict().items()}
    assert built.objective(built.lesson([1, 4, 7])).isfinite()
    assert all(value.equal(before[name]) for name, value in built.objective.state_dict().items())


def test_training_moves_the_student_and_both_embeddings_and_never_the_teacher():
    own = {f"objective.{side}_embedding.{part}" for side in ("student", "teacher") for part in ("weight", "bias")}
    assert trial().moved([0, 1, 2, 3, 4], [5, 6, 7, 8]) == BODY | own


def test_the_teachers_network_gets_no_gradient_though_its_embedding_does():
    built = trial()
    built.teacher.requires_grad_(True)
    built.objective(built.lesson([0, 1, 2])).backward()
    assert all(p.grad is None for p in built.teacher.parameters())
    assert built.objective.teacher_embedding.weight.grad.abs().sum() > 0


def test_training_brings_the_views_of_one_image_together():
    built = trial()
    first = built.objective(built.lesson(list(range(9)))).item()
    optimizer = torch.optim.SGD([*built.student.parameters(), *built.objective.parameters()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = built.objective(built.lesson(list(range(9))))
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2


@pytest.mark.parametrize("rows", [[4], [0, 1, 2]], ids=["batch of one", "one class"])
def test_small_batches_are_graded_like_any(rows):
    built = trial()
    value = built.objective(built.lesson(rows))
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in built.objective.parameters())


@pytest.mark.parametrize("dead", ["student", "teacher"])
def test_a_dead_embedding_keeps_value_and_gradient_finite(dead):
    built = trial()
    with torch.no_grad():
        for parameter in getattr(built.objective, f"{dead}_embedding").parameters():
            parameter.zero_()
    value = built.objective(built.lesson([0, 4, 8]))
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in built.objective.parameters())


def test_a_resumed_training_goes_on_bit_for_bit():
    first = trial()
    first.train([0, 1, 2, 3], [4, 5, 6, 7])
    state, random = first.objective.state_dict(), torch.get_rng_state()
    second = trial()
    second.objective.load_state_dict({name: value.clone() for name, value in state.items()})
    second.student.load_state_dict(first.student.state_dict())
    assert set(state) >= {"student_memory", "teacher_memory", "student_Z", "teacher_Z"}
    ends = []
    for one in (first, second):
        torch.set_rng_state(random)
        one.train([8, 2, 4], [1, 3, 5])
        ends.append([*one.student.state_dict().values(), *one.objective.state_dict().values()])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))


def test_a_step_never_waits_for_the_device():
    built = trial()
    with NoHostReads():
        built.objective(built.lesson([0, 1, 2])).backward()
