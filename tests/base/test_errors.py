from base.errors import EngineError, Fault, OutOfMemory, SpecFaults, TeacherMismatch


def test_the_closed_list_of_codes():
    def codes(cls: type[EngineError]) -> set[str]:
        return {cls.code}.union(*(codes(sub) for sub in cls.__subclasses__()))

    assert codes(EngineError) == {
        "spec_invalid", "teacher_mismatch", "dataset_unreadable", "out_of_memory", "loss_diverged",
        "deadline_exceeded", "worker_lost", "storage_full", "internal",
    }  # fmt: skip


def test_an_error_tells_the_user_from_us():
    assert TeacherMismatch("no", "yes").as_dict() == {
        "code": "teacher_mismatch", "message": "no", "retryable": False, "hint": "yes",
    }  # fmt: skip
    assert OutOfMemory("full").as_dict()["retryable"] is True


def test_faults_are_told_together():
    error = SpecFaults([Fault("/a", "is wrong", "x"), Fault("", "is empty", "y")])
    assert str(error) == "/a: is wrong; /: is empty"
