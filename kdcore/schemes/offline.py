"""One student: taught by a frozen teacher, or by labels alone; and the stage before it, which has no student.

Shapes: N batch, K classes, k members of an ensemble.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdcore.classifier import Classifier, answered
from kdcore.data.views import Batches
from kdcore.lesson import NOTHING, Batch, Lesson, Needs, StepOutput, Teacher, View


class Offline:
    """A frozen teacher and a student see the same view of each image.

    With `answers`, the teacher's most likely class replaces an unknown label (Kim & Rush, EMNLP 2016, arXiv:1606.07947,
    sequence-level distillation).
    """

    def __init__(self, student: Classifier, teacher: Teacher, needs: Needs = NOTHING, answers: bool = False) -> None:
        self.student, self.teacher, self.needs, self.answers = student, teacher, needs, answers
        self.models = {"student": student}
        student.watch(needs.student_taps)
        teacher.show(needs)

    def learners(self) -> list[nn.Module]:
        return [self.student]

    def run(self, batch: Batch) -> StepOutput:
        teacher = self.teacher(batch)
        if self.answers:
            batch = replace(batch, labels=answered(batch.labels, teacher.logits))
        student = self.student(batch.inputs, batch.labels if self.needs.input_gradient else None)
        return StepOutput((student,), batch.labels, (Lesson(student, teacher, batch),))


class Alone:
    """A student with labels alone: supervised training, and the baseline of every distillation."""

    teacher = None

    def __init__(self, student: Classifier) -> None:
        self.student = student
        self.models = {"student": student}

    def learners(self) -> list[nn.Module]:
        return [self.student]

    def run(self, batch: Batch) -> StepOutput:
        return StepOutput((self.student(batch.inputs),), batch.labels)


class Preparation:
    """A teacher without a student: only the objective's own modules are trained."""

    def __init__(self, teacher: Teacher, needs: Needs) -> None:
        self.teacher = teacher
        self.models: Mapping[str, Classifier] = {}
        teacher.show(needs)

    def learners(self) -> list[nn.Module]:
        return []

    def run(self, batch: Batch) -> StepOutput:
        view = self.teacher(batch)
        return StepOutput((), batch.labels, (Lesson(view, view, batch),))


class TeacherAhead(Teacher):
    """A teacher that sees the next batch in a thread of its own, while the student learns from the present one.

    That thread computes with `threads` threads, and the caller with as many as before: torch counts them for each by
    itself. The teacher is run in this thread only, one batch after the other. An error is raised where the view of
    its batch is asked for. `close` waits for the view that is being made.
    """

    def __init__(self, teacher: Teacher, threads: int) -> None:
        self.teacher, self.members = teacher, teacher.members
        self._views: dict[int, tuple[Batch, Future[View]]] = {}
        """By the identity of the batch, which is kept with it."""
        own = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "teacher", _begin_thread, (threads,))
        self._thread.submit(lambda: None).result()
        # A thread that begins later takes the number that was set last, in whatever thread.
        torch.set_num_threads(own)

    def through(self, batches: Batches) -> Iterator[Batch]:
        """Yield the batches; the teacher begins with the next one before each is yielded."""
        waiting = deque[Batch]()
        for batch in self.teacher.through(batches):
            self._expect(batch)
            waiting.append(batch)
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def __call__(self, batch: Batch) -> View:
        self._expect(batch)
        _, view = self._views.pop(id(batch))
        return view.result()

    def _expect(self, batch: Batch) -> None:
        if id(batch) not in self._views:
            self._views[id(batch)] = batch, self._thread.submit(self.teacher, batch)

    def close(self) -> None:
        """End the thread. Views that were not asked for are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._views.clear()

    def show(self, needs: Needs) -> None:
        self.teacher.show(needs)

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        return self.teacher.combined(logits_kNK)

    def soft_targets(self, logits_kNK: Sequence[Tensor], temperature: float) -> Tensor:
        return self.teacher.soft_targets(logits_kNK, temperature)


def _begin_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.get_num_threads()  # Only now the number is this thread's; else it would take the one that is set last.
    # All threads share autocast's store of cast weights, and a thread that leaves its outermost autocast empties it.
    # Inside of this one, which never ends, the teacher leaves the student's alone; frozen weights are not stored.
    torch.autocast_increment_nesting()
