"""Write kdcore/catalog/timm_parameters.json: the sizes of timm's networks, by which a checkpoint's is found.

    python -m bench.timm_parameters

Of each network the learned values without the classifier, and those of the classifier for each class. Every network is
built twice, without memory: about ten minutes.
"""

import json
from pathlib import Path

import kdcore.catalog
from kdcore import vision
from kdcore.checkpoints.names import learned
from kdcore.models.networks import skeleton


def main() -> None:
    sizes: dict[str, list[int]] = {}
    for name in vision.timm().list_models():
        try:
            two, three = (learned(skeleton(f"timm/{name}", classes).state_dict()) for classes in (2, 3))
        except Exception as error:  # Some need another library.
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        if three > two:
            sizes[name] = [two - 2 * (three - two), three - two]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(sizes[name])}" for name in sorted(sizes))
    Path(kdcore.catalog.__file__).with_name("timm_parameters.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
