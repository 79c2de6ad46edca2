"""Write kdcore/catalog/timm_parameters.json: the sizes of timm's networks, by which a checkpoint's is found.

    python -m bench.timm_parameters

Of each network whose classifier is a linear layer: the learned values without it, and its values for each class. Every
network is built once, without memory: about five minutes.
"""

import json
from pathlib import Path

from torch import nn

import kdcore.catalog
from kdcore import vision
from kdcore.models.networks import skeleton
from kdcore.weights.names import learned

CLASSES = 2


def main() -> None:
    path = Path(kdcore.catalog.__file__).with_name("timm_parameters.json")
    sizes: dict[str, tuple[int, int]] = {}
    for name in vision.timm().list_models():
        try:
            network = skeleton(f"timm/{name}", CLASSES)
        except Exception as error:  # Some need another library.
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        classifier = getattr(network, "get_classifier", lambda: None)()
        if isinstance(classifier, nn.Linear) and classifier.out_features == CLASSES:
            each_class = classifier.in_features + (classifier.bias is not None)
            sizes[name] = learned(network.state_dict()) - CLASSES * each_class, each_class
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(sizes[name])}" for name in sorted(sizes))
    path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
