from kdcore.catalog.programs import ProgramFacts

FACTS = ProgramFacts(num_classes=10, channels=3, parameters=1, bytes=1, image_size=(None, 32))


def test_a_program_takes_its_own_size_or_any():
    assert FACTS.takes((32, 32)) and FACTS.takes((8, 32))
    assert not FACTS.takes((32, 8))


def test_it_is_an_architecture_of_its_own():
    assert (FACTS.architecture, FACTS.format, FACTS.batch) == ("program", "pt2", "any")
