"""Methods that teach by the teacher's answers."""

from kdcore.catalog.facts import MethodFacts

_COST = "supervised plus one forward pass of the teacher a step"

RESPONSE = (
    MethodFacts(
        name="kd",
        title="Knowledge distillation of logits",
        paper="Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531",
        family="response",
        matches="the teacher's class probabilities, softened by a temperature",
        needs=["logits"],
        alpha=0.1,
        beta=0.9,
        temperature=4,
        defaults_from="CRD's code (RepDistiller, run_cifar_distill.sh): -r 0.1 -a 0.9, T 4; standardized: beta 9 and T "
        "2 of the authors of logit standardisation",
        cost=_COST,
    ),
    MethodFacts(
        name="dkd",
        title="Decoupled knowledge distillation",
        paper="Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679",
        family="response",
        matches="the target class's probability, and how the rest is shared among the other classes",
        needs=["logits", "labels"],
        alpha=1,
        beta=1,
        temperature=4,
        defaults_from="the authors' code (mdistiller): CE 1, T 4, warm-up 20 of 240 epochs, beta 2 for ResNet-56 to 20",
        cost=_COST,
    ),
    MethodFacts(
        name="nkd",
        title="Normalized knowledge distillation",
        paper="Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, arXiv:2303.13005",
        family="response",
        matches="the target class's probability, and the other classes' normalised to one",
        needs=["logits", "labels"],
        alpha=1,
        beta=1,
        temperature=1,
        defaults_from="the authors' code (cls_KD) for ImageNet: gamma 1.5, T 1; its CIFAR-100 recipe for ResNet-34 to "
        "ResNet-18 has gamma 3.5, T 3",
        cost=_COST,
    ),
    MethodFacts(
        name="dist",
        title="Distillation from a stronger teacher",
        paper="Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536",
        family="response",
        matches="how probabilities correlate, between the classes of a sample and within a class over the batch",
        needs=["logits"],
        alpha=1,
        beta=2,
        temperature=4,
        defaults_from="as others report them for CIFAR-100, not read in the authors' code: 2 over all, T 4; that code "
        "has both relations at 1, and T 1 for ImageNet",
        cost=_COST,
    ),
    MethodFacts(
        name="ttm",
        title="Transformed teacher matching",
        paper="Zheng & Yang, Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024, arXiv:2402.11148",
        family="response",
        matches="the teacher's probabilities raised to a power, by the student's plain ones",
        needs=["logits"],
        alpha=1,
        beta=4,
        temperature=5,
        defaults_from="the authors' code, its example of WTTM (vgg13 to vgg8, beside CRD): CE 1, beta 4, "
        "gamma 0.2, which is T 5; they choose both by the pair",
        cost=_COST,
    ),
)
