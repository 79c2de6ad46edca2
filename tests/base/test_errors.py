from base.errors import EngineError, Fault, OutOfMemory, SpecFaults, TeacherMismatch


def test_engine_errors_have_the_closed_list_of_codes():
    def codes(cls: type[EngineError]) -> set[str]:
        return {cls.code}.union(*(codes(sub) for sub in cls.__subclasses__()))

    assert codes(EngineError) == {
        "spec_invalid", "warning_refused", "teacher_mismatch", "teacher_unavailable",
        "weights_unavailable", "dataset_unreadable", "input_lost", "out_of_memory", "loss_diverged",
        "deadline_exceeded", "worker_lost", "storage_full", "too_many_files", "engine_silent", "internal",
    }  # fmt: skip


def test_as_dict_has_code_message_retryable_and_hint():
    assert TeacherMismatch("no", "yes").as_dict() == {
        "code": "teacher_mismatch", "message": "no", "retryable": False, "hint": "yes",
    }  # fmt: skip
    assert OutOfMemory("full").as_dict()["retryable"] is True


def test_spec_faults_joins_their_messages():
    error = SpecFaults([Fault("/a", "is wrong", "x"), Fault("", "is empty", "y")])
    assert str(error) == "/a: is wrong; /: is empty"
