"""What a client may ask for: one frozen, typed vocabulary that is the request body, the stored JSON, the engine's
input and the checkpoint's metadata. Unknown fields are refused; defaults come from the field's papers and say so.

A plain name stands for an object that holds only that name: `"method": "kd"` is `{"name": "kd"}`.
`None` means "not given": `resolve` spells it out once the data and the teacher are known.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from kdcore.catalog import architecture
from kdcore.spec.base import Vocabulary, named
from kdcore.spec.methods import Method

TEACHER_REFERENCES = ("model:", "job:", "blob:sha256:", "weights:", "file:")


def _single_or_several(given: Any) -> str:
    return "several" if isinstance(given, list | tuple) else "single"


def _known_architecture(name: str) -> str:
    architecture(name)
    return name


def _known_reference(reference: str) -> str:
    if any(reference.startswith(prefix) and len(reference) > len(prefix) for prefix in TEACHER_REFERENCES):
        return reference
    raise ValueError(
        "must be model:<name or id>, job:<id>, blob:sha256:<hex>, weights:<torchvision weights> or file:<path>"
    )


Architecture = Annotated[str, AfterValidator(_known_architecture)]
Reference = Annotated[str, AfterValidator(_known_reference)]
Channelwise = Annotated[tuple[float, ...], Field(min_length=1, max_length=4)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Preprocessing(Vocabulary):
    """Normalisation belongs to a model: pixels in 0..1 become (pixel - mean) / std, channel by channel."""

    mean: Channelwise
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=4)]


class Dataset(Vocabulary):
    source: Annotated[str, Field(min_length=1, max_length=300)] = Field(
        description="A built-in name (digits, cifar100, ...), a registered data set's name or id, blob:sha256:<hex>, "
        "or, for the engine by hand, file:<path>."
    )
    image_size: int | None = Field(
        default=None, ge=4, le=1024, description="Height and width in pixels that images of differing sizes get."
    )


class Teacher(Vocabulary):
    """A trained network that teaches: a checkpoint of a known architecture, or a program of any."""

    checkpoint: Reference | None = Field(
        default=None,
        description="model:<name or id>, job:<id> (its student), blob:sha256:<hex>, weights:<torchvision weights>, "
        "or, for the engine by hand, file:<path>.",
    )
    program: Annotated[str, Field(pattern=r"^(blob:sha256:|file:).+$")] | None = Field(
        default=None,
        description="In the place of a checkpoint: blob:sha256:<hex> (or file:<path>) of a torch.export program (.pt2) "
        "that answers normalised images with logits. It teaches by them alone: it has no taps.",
    )
    architecture: Architecture | None = Field(
        default=None, description="May be left out where the checkpoint says it: model:, job: and weights:."
    )
    preprocessing: Preprocessing | None = Field(
        default=None, description="Default: the checkpoint's own where it says one, else the data's mean and std."
    )
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Among several teachers: its share in the averaged probabilities. Default: equal."
    )


class Student(Vocabulary):
    architecture: Architecture
    preprocessing: Preprocessing | None = Field(default=None, description="Default: the data's mean and std.")


class Unlabelled(Vocabulary):
    """Images whose labels nobody knows, or looks at: the teacher's answers are what is learned from them."""

    source: Annotated[str, Field(min_length=1, max_length=300)] = Field(
        description="As a data set's source: the training images of a registered or built-in set, blob:sha256:<hex>, "
        "or file:<path>; it need hold no labels."
    )
    labels: Literal["teacher", "none"] = Field(
        default="teacher",
        description="What stands in for their labels. teacher: the class that it finds most likely (Kim & Rush 2016, "
        "arXiv:1606.07947). none: nothing; only the distillation loss sees them.",
    )
    labelled_too: bool = Field(
        default=True, description="Whether the data set's own labelled images are trained on too."
    )


class Sgd(Vocabulary):
    """Defaults: the CIFAR recipe of CRD (Tian et al., ICLR 2020): lr 0.05, momentum 0.9, no Nesterov."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.05, gt=0, le=100)
    momentum: Fraction = 0.9
    weight_decay: float = Field(default=5e-4, ge=0, le=10)
    nesterov: bool = False


class AdamW(Vocabulary):
    """Loshchilov & Hutter, ICLR 2019 (arXiv:1711.05101); defaults are PyTorch's."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, le=100)
    weight_decay: float = Field(default=1e-2, ge=0, le=10)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)


class Multistep(Vocabulary):
    """Multiply the learning rate by `gamma` at each milestone. Default milestones: 150, 180 and 210 of 240 epochs
    (CRD's recipe), scaled to the epochs asked for."""

    name: Literal["multistep"] = "multistep"
    milestones: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, description="In epochs, rising.")
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup_epochs: float = Field(default=0, ge=0, description="Linear rise from zero, in epochs.")


class Cosine(Vocabulary):
    """Half a cosine from the learning rate down to `final_fraction` of it (Loshchilov & Hutter, ICLR 2017)."""

    name: Literal["cosine"] = "cosine"
    final_fraction: float = Field(default=0, ge=0, le=1)
    warmup_epochs: float = Field(default=0, ge=0, description="Linear rise from zero, in epochs.")


Optimizer = Sgd | AdamW
Schedule = Multistep | Cosine


class NoAugmentation(Vocabulary):
    name: Literal["none"] = "none"


class CropFlip(Vocabulary):
    """Pad with black, crop back at random, mirror every other time: the field's CIFAR augmentation."""

    name: Literal["crop_flip"] = "crop_flip"
    padding: int = Field(default=4, ge=0, le=64, description="Pixels on each side.")
    flip: bool = True


class RandomResizedCrop(Vocabulary):
    """A crop of random area and aspect ratio, brought back to full size (Szegedy et al., CVPR 2015)."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.35, 1.0)
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (3 / 4, 4 / 3)
    flip: bool = True


Augmentation = NoAugmentation | CropFlip | RandomResizedCrop


class Mixup(Vocabulary):
    """Zhang et al., ICLR 2018 (arXiv:1710.09412): blend two images and their labels."""

    name: Literal["mixup"] = "mixup"
    alpha: float = Field(default=0.2, gt=0, le=100)


class Cutmix(Vocabulary):
    """Yun et al., ICCV 2019 (arXiv:1905.04899): paste a box of one image into another, labels by area."""

    name: Literal["cutmix"] = "cutmix"
    alpha: float = Field(default=1.0, gt=0, le=100)


Mix = Mixup | Cutmix


class Training(Vocabulary):
    """How the student learns. Defaults: the CIFAR-100 recipe of CRD, on which the field's tables stand."""

    epochs: int = Field(default=240, ge=1, le=100_000)
    batch_size: int = Field(
        default=64, ge=2, le=65_536, description="Every batch is whole: an epoch's remainder is left out."
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    optimizer: Annotated[Optimizer, Field(discriminator="name"), named("name")] = Sgd()
    schedule: Annotated[Schedule, Field(discriminator="name"), named("name")] = Multistep()
    augmentation: Annotated[Augmentation, Field(discriminator="name"), named("name")] | None = Field(
        default=None,
        description="Default: none for named grey sets such as digits, crop_flip up to 64 pixels, else "
        "random_resized_crop.",
    )
    mix: Annotated[Mix, Field(discriminator="name"), named("name")] | None = None
    label_smoothing: Fraction = 0.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Decay per step of an exponential moving average of the weights, which is exported."
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Largest gradient norm.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on a GPU that has it, else fp32."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    validation_fraction: float = Field(
        default=0.1, gt=0, le=0.5, description="Part of the training images held out to choose the best epoch."
    )
    checkpoint_every_s: float = Field(default=30, ge=0, le=86_400, description="Seconds between resumable states.")


OneStudent = Annotated[Student, named("architecture")]

# Told apart by their JSON type, so that a fault names fields of what was meant and of nothing else.
OneOrSeveralTeachers = Annotated[
    Annotated[Teacher, Tag("single")]
    | Annotated[tuple[Teacher, ...], Field(min_length=1, max_length=16), Tag("several")],
    Discriminator(_single_or_several),
]
OneOrSeveralStudents = Annotated[
    Annotated[OneStudent, Tag("single")]
    | Annotated[tuple[OneStudent, ...], Field(min_length=1, max_length=8), Tag("several")],
    Discriminator(_single_or_several),
]
OneOrSeveralMethods = Annotated[
    Annotated[Method, Tag("single")] | Annotated[tuple[Method, ...], Field(min_length=1, max_length=8), Tag("several")],
    Discriminator(_single_or_several),
]


class JobSpec(Vocabulary):
    """One distillation: loss = alpha · cross_entropy(student, labels) + beta · distillation(student, teacher).

    The distillation term of a logit method carries T², so that alpha and beta keep their meaning when T changes.
    """

    name: str | None = Field(default=None, min_length=1, max_length=200)
    dataset: Annotated[Dataset, named("source")]
    unlabelled: Annotated[Unlabelled, named("source")] | None = None
    teacher: OneOrSeveralTeachers | None = Field(
        default=None, description="A list's probabilities are averaged, by their weights."
    )
    assistants: Annotated[tuple[OneStudent, ...], Field(max_length=8)] = Field(
        default=(),
        description="Networks between teacher and student, largest first: each is distilled from the one before "
        "(Mirzadeh et al., AAAI 2020, arXiv:1902.03393).",
    )
    student: OneOrSeveralStudents = Field(description="A list where several learn from each other (dml).")
    method: OneOrSeveralMethods = Field(
        description="A list is a sum: each method's loss times its weight, and beta times the sum."
    )
    temperature: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        default=None,
        description="Divides both logits before the softmax. Default: the method's own (GET /v1/methods), in a list "
        "that of the first that has one.",
    )
    alpha: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None,
        description="Weight of the labels' loss. Default: the method's own (GET /v1/methods), in a list the first's.",
    )
    beta: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None,
        description="Weight of the distillation loss. Default: the method's own (GET /v1/methods); 1 for a list, whose "
        "members have weights.",
    )
    training: Training = Training()
    baseline: Annotated[str, Field(pattern=r"^(none|train|(job|blob|file):.+)$")] = Field(
        default="none",
        description="none, train (the same student, recipe and seed without the teacher), or job:<id>: the student of "
        "an earlier job; by hand file:<path> of its student.safetensors.",
    )

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.method if isinstance(self.method, tuple) else (self.method,)

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        if self.teacher is None:
            return ()
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)

    @property
    def students(self) -> tuple[Student, ...]:
        """The first is the one that the job is about."""
        return self.student if isinstance(self.student, tuple) else (self.student,)

    @property
    def method_name(self) -> str:
        """Names of all methods, as in `kd+attention`."""
        return "+".join(method.name for method in self.methods)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
