import subprocess
import sys

import pytest

from kdcore.catalog import DATASETS, named_facts


@pytest.mark.parametrize("name", DATASETS)
def test_numbers_agree_with_each_other(name):
    dataset = DATASETS[name]
    assert dataset.name == name
    assert len(dataset.mean) == len(dataset.std) == dataset.channels
    assert all(0 < mean < 1 for mean in dataset.mean) and all(0 < std < 0.5 for std in dataset.std)
    assert len(dataset.class_names) in (0, dataset.num_classes)
    assert min(dataset.image_size) >= 8 and dataset.test > 0 and dataset.train > dataset.num_classes


def test_facts_before_fetching():
    facts = named_facts("cifar10")
    assert (facts.kind, facts.num_classes, facts.train, facts.image_size) == ("named", 10, 50_000, (32, 32))
    assert facts.class_names[3] == "cat" and facts.digest is None and not facts.test_carved


def test_facts_at_another_size():
    assert named_facts("imagenette", 64).image_size == (64, 64)


def test_class_names_that_only_a_download_tells_are_numbers():
    assert named_facts("cifar100").class_names == [str(label) for label in range(100)]


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        named_facts("cifar11")


def test_the_catalog_needs_no_torch():
    code = "import sys, kdcore.catalog.datasets; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
