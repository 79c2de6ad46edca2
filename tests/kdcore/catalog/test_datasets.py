import subprocess
import sys

import pytest

from kdcore.catalog import DATASETS, named_facts


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_facts_agree_with_each_other(name):
    dataset = DATASETS[name]
    assert dataset.name == name
    assert len(dataset.mean) == len(dataset.std) == dataset.channels
    assert all(0 < mean < 1 for mean in dataset.mean) and all(0 < std < 0.5 for std in dataset.std)
    assert len(dataset.class_names) in (0, dataset.num_classes)
    assert min(dataset.image_size) >= 8 and dataset.test > 0 and dataset.train > dataset.num_classes


def test_named_facts_before_a_download():
    facts = named_facts("cifar10")
    assert (facts.kind, facts.num_classes, facts.train, facts.image_size) == ("named", 10, 50_000, (32, 32))
    assert facts.class_names[3] == "cat" and facts.digest is None and not facts.test_carved


def test_named_facts_at_another_image_size():
    assert named_facts("imagenette", 64).image_size == (64, 64)


def test_named_facts_number_unknown_class_names():
    assert named_facts("cifar100").class_names == [str(label) for label in range(100)]


def test_named_facts_raises_key_error_for_an_unknown_name():
    with pytest.raises(KeyError):
        named_facts("cifar11")


def test_datasets_load_no_torch():
    code = "import sys, kdcore.catalog.datasets; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
