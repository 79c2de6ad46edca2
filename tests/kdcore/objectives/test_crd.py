import math

import pytest
import torch
from torch.nn.functional import normalize

from kdcore.lesson import Lesson
from kdcore.objectives import crd
from kdcore.objectives.crd import ContrastiveRepresentation, crd_nce_loss, crd_scores
from kdcore.objectives.objective import Setting
from kdcore.spec.methods.relations import Crd
from tests.kdcore.objectives.lessons import LABELS, SETTING, built, lesson, normal, parameters, setting


def test_crd_nce_loss_equals_a_value_computed_by_hand():
    """One negative of four images: noise is expected with 1/4. A positive score of 3/4 counts as true with 3/4, a
    negative one of 1/4 as noise with 1/2."""
    scores = torch.tensor([[3 / 4, 1 / 4]], dtype=torch.float64)
    assert crd_nce_loss(scores, data_size=4).item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 2), abs=1e-6)


def test_crd_scores_equal_a_value_computed_by_hand():
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
def test_crd_nce_loss_equals_plain_loops(batch, negatives, size):
    scores = normal(batch, 1 + negatives).exp() / size
    assert crd_nce_loss(scores, data_size=size).item() == pytest.approx(naive_loss(scores, size), rel=1e-9)


def test_crd_nce_loss_is_a_mean_over_the_batch():
    scores = normal(4, 8).exp() / 100
    once = crd_nce_loss(scores, data_size=100).item()
    assert crd_nce_loss(scores.repeat(3, 1), data_size=100).item() == pytest.approx(once)


def test_crd_nce_loss_of_a_positive_score_that_rounds_to_zero_is_large_and_finite():
    scores = torch.tensor([[0.0, 1e30]], requires_grad=True)
    value = crd_nce_loss(scores, data_size=10)
    value.backward()
    assert 80 < value.item() < 200 and scores.grad.isfinite().all()


both_ways = pytest.mark.parametrize("whole", [True, False], ids=["matrix product", "fetched rows"])


@both_ways
def test_crd_scores_equal_plain_loops(whole, monkeypatch):
    monkeypatch.setattr(crd, "_PRODUCT_PAYS", 1000 if whole else 0)
    embedding, memory = normal(3, 4).requires_grad_(), normal(9, 4, seed=1)
    rows = torch.tensor([[0, 5, 5, 8], [1, 2, 3, 4], [8, 0, 0, 0]])
    scores = crd_scores(embedding, memory, rows, temperature=0.7)
    by_loops = [
        [math.exp(sum(e * m for e, m in zip(sample, memory[row].tolist(), strict=True)) / 0.7) for row in own]
        for sample, own in zip(embedding.tolist(), rows.tolist(), strict=True)
    ]
    assert scores.tolist() == [pytest.approx(row, rel=1e-9) for row in by_loops]
    assert torch.autograd.gradcheck(lambda x: crd_scores(x, memory, rows, temperature=0.7), embedding)


@both_ways
def test_crd_scores_have_the_gradient_of_the_memory_before_it_changes(whole, monkeypatch):
    monkeypatch.setattr(crd, "_PRODUCT_PAYS", 1000 if whole else 0)
    memory, rows = normal(9, 4, seed=1), torch.tensor([[0, 5], [1, 2]])
    expected, embedding = normal(2, 4).requires_grad_(), normal(2, 4).requires_grad_()
    crd_scores(expected, memory, rows, temperature=1).sum().backward()
    scores = crd_scores(embedding, memory, rows, temperature=1)
    memory.zero_()
    scores.sum().backward()
    assert embedding.grad.equal(expected.grad)


def batch(*rows: int) -> Lesson:
    """Embeddings of these training images."""
    index = torch.tensor(rows)
    student, teacher = (normal(10, width, seed=width, dtype=torch.float32)[index] for width in (4, 7))
    return lesson({"fc@in": student.requires_grad_()}, {"fc@in": teacher}, labels=LABELS[index], index=index)


def objective(setting: Setting = SETTING, **options: float) -> ContrastiveRepresentation:
    torch.manual_seed(3)
    options = {"width": 6, "negatives": 20, **options}
    return built(ContrastiveRepresentation(Crd(tap="fc@in", **options), setting), batch(0, 3))


def negatives_of(contrast: ContrastiveRepresentation, row: int, draws: int = 200) -> set[int]:
    """The training rows that are drawn as negatives of one."""
    row_at = {place: row for row, place in enumerate(contrast.place.tolist())}
    places = contrast._negatives(contrast.place[torch.tensor([row] * draws)])
    return {row_at[place] for place in places.flatten().tolist()}


@pytest.mark.parametrize("row", range(9))
def test_contrastive_representation_draws_all_training_images_of_other_classes(row):
    """Row 9 is of class 1 too, but held out."""
    assert negatives_of(objective(), row) == {other for other in range(9) if LABELS[other] != LABELS[row]}


def test_contrastive_representation_draws_negatives_evenly():
    contrast = objective(negatives=8000)
    counts = contrast._negatives(contrast.place[:1]).flatten().bincount(minlength=9)
    assert sorted(counts.tolist())[:3] == [0, 0, 0]
    assert all(1200 < count < 1470 for count in sorted(counts.tolist())[3:])


def with_labels(*labels: int) -> Setting:
    return setting(labels=torch.tensor(labels), rows=torch.arange(len(labels)))


def test_contrastive_representation_draws_all_others_for_an_unknown_label():
    contrast = objective(with_labels(0, -1, 0, 1, -1, 1, 1, 0))
    assert negatives_of(contrast, 1) == {0, 2, 3, 4, 5, 6, 7}
    assert negatives_of(contrast, 0) == {1, 3, 4, 5, 6}


def test_contrastive_representation_draws_from_all_images_of_a_single_class():
    assert negatives_of(objective(with_labels(*[2] * 8)), 3) == set(range(8))


def test_contrastive_representation_draws_a_single_unknown_image_for_itself():
    one = setting(labels=torch.full((8,), -1), rows=torch.tensor([3]))
    assert negatives_of(objective(one), 3) == {3}


def test_contrastive_representation_has_no_memory_of_held_out_rows():
    contrast = objective()
    assert len(contrast.student_memory) == len(contrast.teacher_memory) == 9
    assert sorted(contrast.place.tolist()) == list(range(10)) and contrast.place[9] == 9


def test_contrastive_representation_starts_with_the_papers_sizes():
    contrast = objective(width=8)
    assert parameters(contrast) == (4 + 1) * 8 + (7 + 1) * 8
    for memory in (contrast.student_memory, contrast.teacher_memory):
        assert memory.abs().max().item() == pytest.approx(math.sqrt(3 / 8), rel=0.1)
        assert memory.abs().max().item() <= math.sqrt(3 / 8)
    assert contrast.student_Z == contrast.teacher_Z == 0


def embedded(contrast: ContrastiveRepresentation, seen: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    student = contrast.student_embedding(seen.student.taps["fc@in"])
    return student, contrast.teacher_embedding(seen.teacher.taps["fc@in"])


def by_plain_loops(contrast: ContrastiveRepresentation, rows: list[int], negatives: torch.Tensor) -> float:
    """The whole loss of a first step, from the embeddings and memories as they are."""
    place, total = contrast.place.tolist(), 0.0
    memories = (contrast.teacher_memory, contrast.student_memory)
    for side, other in zip(embedded(contrast, batch(*rows)), memories, strict=True):
        memory, unit = other.tolist(), [[v / math.hypot(*row) for v in row] for row in side.tolist()]
        scores = [
            [math.exp(sum(e * m for e, m in zip(embedding, memory[j], strict=True)) / 0.07) for j in (place[row], *own)]
            for embedding, row, own in zip(unit, rows, negatives.tolist(), strict=True)
        ]
        z = sum(map(sum, scores)) / (len(rows) * len(scores[0])) * len(memory)
        total += naive_loss(torch.tensor(scores, dtype=torch.float64) / z, len(memory))
    return total


def test_contrastive_representation_equals_plain_loops_in_a_first_step(monkeypatch):
    contrast = objective(negatives=5)
    negatives = torch.tensor([[4, 5, 6, 7, 8], [0, 1, 2, 8, 8], [0, 0, 1, 3, 4]])
    monkeypatch.setattr(contrast, "_negatives", lambda places: negatives)
    by_loops = by_plain_loops(contrast, [1, 4, 7], negatives)
    value = contrast(batch(1, 4, 7))
    assert value.item() == pytest.approx(by_loops, rel=1e-5)
    assert set(contrast.observed) == {"crd/student", "crd/teacher"}
    assert sum(contrast.observed.values()).item() == pytest.approx(value.item())


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_contrastive_representation_updates_the_memory_of_its_batch_only(side):
    contrast, rows = objective(momentum=0.25), [1, 4, 7]
    memory = (contrast.student_memory, contrast.teacher_memory)[side]
    before, places = memory.clone(), contrast.place[torch.tensor(rows)]
    expected = 0.25 * before[places] + 0.75 * normalize(embedded(contrast, batch(*rows))[side])
    contrast(batch(*rows))
    assert torch.allclose(memory[places], normalize(expected))
    untouched = torch.ones(9, dtype=torch.bool).index_fill(0, places, False)
    assert memory[untouched].equal(before[untouched])


def test_contrastive_representation_stores_the_mean_of_an_image_that_occurs_twice():
    contrast, seen = objective(momentum=0.5), batch(1, 4, 1)
    with torch.no_grad():
        seen.student.taps["fc@in"][2] += 1
    student, place = normalize(embedded(contrast, seen)[0]), contrast.place[1]
    expected = 0.5 * contrast.student_memory[place] + 0.25 * (student[0] + student[2])
    contrast(seen)
    assert torch.allclose(contrast.student_memory[place], normalize(expected, dim=0))


def test_contrastive_representation_sets_z_in_its_first_batch():
    contrast = objective()
    contrast(batch(1, 4, 7))
    first = contrast.student_Z.clone(), contrast.teacher_Z.clone()
    contrast(batch(0, 2, 3))
    assert (contrast.student_Z, contrast.teacher_Z) == first and min(first) > 0


def test_contrastive_representation_changes_nothing_in_eval_mode():
    contrast = objective().eval()
    before = {name: value.clone() for name, value in contrast.state_dict().items()}
    assert contrast(batch(1, 4, 7)).isfinite()
    assert all(value.equal(before[name]) for name, value in contrast.state_dict().items())


def test_contrastive_representation_saves_memories_and_z_with_its_state():
    assert set(objective().state_dict()) >= {"student_memory", "teacher_memory", "student_Z", "teacher_Z"}


def test_contrastive_representation_brings_the_embeddings_of_one_image_together():
    contrast, rows = objective(), list(range(9))
    first = contrast(batch(*rows)).item()
    optimizer = torch.optim.SGD(contrast.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = contrast(batch(*rows))
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2


def test_contrastive_representation_is_finite_on_a_batch_of_one_class():
    contrast = objective()
    value = contrast(batch(0, 1, 2))
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in contrast.parameters())


@pytest.mark.parametrize("dead", ["student", "teacher"])
def test_contrastive_representation_is_finite_if_an_embedding_is_zero(dead):
    contrast = objective()
    with torch.no_grad():
        for parameter in getattr(contrast, f"{dead}_embedding").parameters():
            parameter.zero_()
    value = contrast(batch(0, 4, 8))
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in contrast.parameters())
