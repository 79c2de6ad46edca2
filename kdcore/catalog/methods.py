"""What each method is and needs, for clients that choose one and for the rules that check a spec."""

from kdcore.catalog.facts import MethodFacts

METHODS: dict[str, MethodFacts] = {
    facts.name: facts
    for facts in (
        MethodFacts(
            name="supervised",
            title="Training on labels alone",
            paper="none: the reference that every distilled student is held against",
            matches="nothing; there is no teacher",
            needs_teacher=False,
            uses_temperature=False,
            scheme="alone",
            cost="one forward and one backward pass of the student per step",
        ),
        MethodFacts(
            name="kd",
            title="Knowledge distillation of logits",
            paper="Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531",
            matches="the teacher's class probabilities, softened by a temperature",
            needs_teacher=True,
            uses_temperature=True,
            scheme="offline",
            cost="supervised plus one forward pass of the teacher per step",
        ),
    )
}
