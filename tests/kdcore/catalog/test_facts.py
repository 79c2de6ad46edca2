from kdcore.catalog import ProgramFacts

PROGRAM = ProgramFacts(num_classes=10, channels=3, parameters=1, bytes=1, image_size=(None, 32))


def test_program_facts_takes_its_own_image_size_or_any():
    assert PROGRAM.takes((32, 32)) and PROGRAM.takes((8, 32))
    assert not PROGRAM.takes((32, 8))


def test_program_facts_are_an_architecture_of_their_own():
    assert (PROGRAM.architecture, PROGRAM.format, PROGRAM.batch) == ("program", "pt2", "any")
