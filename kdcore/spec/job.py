"""The job spec: the request body, the stored JSON, the engine's input and the checkpoint's metadata.

A plain string stands for an object with only that field: `"method": "kd"` is `{"name": "kd"}`.
`None` means that a field was not given; `resolve` replaces it once the data and the teacher are known.
"""

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from base.references import BLOB, FILE, REFERENCE_PREFIXES
from base.text import PATTERN, STORED, Text, shown, unwanted
from kdcore.catalog import architecture
from kdcore.spec.methods import Method, SchemeOptions, scheme_of
from kdcore.spec.shipping import Documents, ExportOptions, Formats, Quantization
from kdcore.spec.vocabulary import Bounds, Vocabulary, at_most, named


def _single_or_several(given: Any) -> str:
    return "several" if isinstance(given, list | tuple) else "single"


def _word_or_object(given: Any) -> str:
    return "object" if isinstance(given, dict | CachedViews) else "word"


def _known_architecture(name: str) -> str:
    architecture(name)
    return name


def _known_reference(reference: str) -> str:
    if any(reference.startswith(prefix) and len(reference) > len(prefix) for prefix in REFERENCE_PREFIXES):
        return reference
    raise ValueError(
        "must be model:<name or id>, job:<id>, blob:sha256:<hex>, weights:<published weights> or file:<path>"
    )


MOST_CLASSES = 100_000
Architecture = Annotated[str, Text(200), AfterValidator(_known_architecture)]
Reference = Annotated[str, Text(1000), AfterValidator(_known_reference)]
FAR_ABOVE_ONE = 3.0
"""The largest size of a mean or std of pixels in 0..1. Those of pixels in 0..255 are above it, but for black images."""

NEAR_ONE = Field(json_schema_extra={"maximum": FAR_ABOVE_ONE})
"""For the schema of a number that `_of_scaled_pixels` checks."""


def _of_scaled_pixels(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(abs(value) > FAR_ABOVE_ONE for value in values):
        raise ValueError(f"{list(values)} are not of pixels in 0..1: divide by 255")
    return values


def _of_one_line(names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    # One look at all of them together: a list may have a hundred thousand.
    if info.context is not STORED and unwanted("".join(names)) is not None:
        number, fault = next((at, fault) for at, name in enumerate(names) if (fault := unwanted(name)) is not None)
        raise ValueError(f"name {number}: {fault}")
    return names


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise ValueError(f"each class has one name; {', '.join(map(repr, twice[:3]))} is there twice")
    return names


def _is_output(name: str) -> bool:
    return 1 <= len(name) <= 1000 and unwanted(name) is None


def _plain_map(given: Any, info: ValidationInfo) -> Any:
    """Refuse a map by its first wrong entry: each of very many would be a fault for each form that a value may have."""
    if isinstance(given, dict):
        for name, outputs in given.items():
            listed = outputs if isinstance(outputs, list | tuple) else (outputs,)
            faulty = (text for text in (name, *listed) if isinstance(text, str) and not _is_output(text))
            if info.context is not STORED and (text := next(faulty, None)) is not None:
                raise ValueError(f"{shown(text[:100])!r}: the name of a class has 1 to 1000 characters, of one line")
            if not all(isinstance(one, str) or (type(one) is int and 0 <= one < MOST_CLASSES) for one in listed):
                raise ValueError(f"{name[:100]!r}: the name or number of an output, or a list of them, belongs here")
    return given


def _known_encoding(name: str) -> str:
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(f"there is no encoding {name!r}; Python's names are meant, such as cp932 or gb18030") from None
    return name


ClassNames = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1000, json_schema_extra={"pattern": PATTERN})], ...],
    Field(min_length=2, max_length=MOST_CLASSES, fail_fast=True, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_each_once),
    AfterValidator(_of_one_line),
]
Output = Annotated[str, Text(1000)] | Annotated[int, Field(strict=True, ge=0, lt=MOST_CLASSES)]
ClassMap = Annotated[
    dict[
        Annotated[str, Text(1000)],
        Output | Annotated[tuple[Output, ...], Field(min_length=1, max_length=MOST_CLASSES)],
    ],
    Field(min_length=2, max_length=MOST_CLASSES),
    BeforeValidator(_plain_map),
]
Channelwise = Annotated[
    tuple[Annotated[float, NEAR_ONE], ...],
    Field(min_length=1, max_length=4),
    at_most(4),
    AfterValidator(_of_scaled_pixels),
]
Part = Annotated[str, Text(300)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
WarmUp = Annotated[float, Field(ge=0, le=100_000, description="Linear rise of the rate from zero, in epochs.")]
MixAlpha = Annotated[
    float,
    Field(gt=0, le=100),
    Bounds(ge=1e-3),
    Field(description="The shares of two images are drawn from Beta(alpha, alpha)."),
]
PartOfArea = Annotated[float, Field(gt=0, le=1), Bounds(ge=1e-4)]
WidthOverHeight = Annotated[float, Field(gt=0), Bounds(ge=0.01, le=100)]
Flip = Annotated[bool, Field(description="Mirror each image with probability 1/2.")]


Labels = Annotated[
    dict[
        Annotated[str, Text(63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")],
        Annotated[str, Text(200, min_length=0)],
    ],
    Field(max_length=16, description='Names and values to find it by, such as {"team": "vision"}.'),
    at_most(16),
]


class Preprocessing(Vocabulary):
    """The normalisation of a model's input: (pixel - mean) / std for each channel, of pixels in 0..1."""

    mean: Channelwise = Field(description="One number for each channel, of pixels in 0..1.")
    std: Annotated[
        tuple[Annotated[float, Field(gt=0), Bounds(ge=1e-3), NEAR_ONE], ...],
        Field(min_length=1, max_length=4),
        at_most(4),
        AfterValidator(_of_scaled_pixels),
    ] = Field(description="One number for each channel, of pixels in 0..1.")


class DataOptions(Vocabulary):
    """How the images of a data set are read. A field that is not given is that of the set's registration, else the
    default, which a resolved spec writes out."""

    image_size: int | None = Field(
        default=None, ge=4, le=1024, description="Height and width to which images of different sizes are resized."
    )
    resize: Literal["crop", "squash", "pad"] | None = Field(
        default=None,
        description="How an image becomes a square of image_size. crop, the default: the shorter side is resized, and "
        "the centre cut out. squash: each side is resized by itself. pad: the longer side is resized, and black bars "
        "fill the rest.",
    )
    resize_to: int | None = Field(
        default=None,
        ge=4,
        le=4096,
        description="Of a crop: the length to which the shorter side is resized before the centre is cut out, as 256 "
        "for 224 in torchvision's evaluation. Default: image_size.",
    )
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = Field(
        default=None, description="Of the resizing; bilinear (the default) and bicubic are antialiased."
    )
    channels: Literal[1, 3] | None = Field(
        default=None,
        description="3: grey images get three equal channels. 1: colour images become grey (ITU-R 601 luma). Default: "
        "1 if all are grey, else 3; grey images that only colour teachers are to see get 3.",
    )
    orientation: Literal["ignore", "apply"] | None = Field(
        default=None,
        description="What a camera's orientation tag does. ignore, the default: nothing, as in torchvision's loader. "
        "apply: the image is turned upright.",
    )
    skip_unreadable: bool | None = Field(
        default=None, description="True: image files that cannot be read are left out. Default: false, an error."
    )
    limit: int | None = Field(
        default=None,
        ge=2,
        le=1_000_000_000,
        description="Use so many training images only, drawn evenly over the classes. Test images are not limited.",
    )
    limit_seed: int | None = Field(default=None, ge=0, lt=2**63, description="Seed of that draw. Default: 0.")
    class_names: ClassNames | None = Field(
        default=None,
        description="The data's own names in another order, which then is that of the classes; or new names, in the "
        "order of the data's classes.",
    )
    encoding: Annotated[str, Text(40), AfterValidator(_known_encoding)] | None = Field(
        default=None, description="The encoding of names in an archive that are not UTF-8, such as cp932."
    )

    @field_validator("resize_to")
    @classmethod
    def _goes_with_a_crop(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None or "image_size" not in info.data or "resize" not in info.data:
            return value
        size, how = info.data["image_size"], info.data["resize"]
        if how not in (None, "crop"):
            raise ValueError(f"only resize: crop has it, not {how}")
        if size is None or value < size:
            raise ValueError("give an image_size, too, which is not larger: the part that is cut out")
        return value

    @property
    def options(self) -> "DataOptions":
        """The options alone."""
        return DataOptions.model_construct(**{name: getattr(self, name) for name in DataOptions.model_fields})

    def given(self) -> dict[str, Any]:
        """Return the options that are set, as JSON."""
        return self.options.model_dump(mode="json", exclude_none=True)

    def deciding(self) -> dict[str, Any]:
        """Return the options, as JSON, that make the data another than without any."""
        given = {name: value for name, value in self.given().items() if value != OPTION_DEFAULTS.get(name)}
        if "limit" not in given:
            given.pop("limit_seed", None)
        return given

    def over(self, registered: "DataOptions") -> "DataOptions":
        """Return these options, and those of a registration for what is not given here.

        A size that is given here is a choice of its own: the registration's `resize_to` does not belong to it.
        """
        given, base = self.given(), registered.given()
        if given.keys() & {"image_size", "resize"}:
            base.pop("resize_to", None)
        if "resize_to" in given:
            base.pop("resize", None)
        return DataOptions.model_validate({**base, **given}, context=STORED)

    def for_unlabelled(self) -> "DataOptions":
        """Return the options for unlabelled images that are read like these: without those of classes."""
        return self.options.model_copy(update={"limit": None, "limit_seed": None, "class_names": None})


OPTION_DEFAULTS: dict[str, Any] = {
    "resize": "crop",
    "interpolation": "bilinear",
    "orientation": "ignore",
    "skip_unreadable": False,
    "limit_seed": 0,
}
"""What is meant by options that are not given. Those not listed here change nothing when they are not given."""


class Dataset(DataOptions):
    source: Annotated[str, Text(300)] = Field(
        description="A built-in name (digits, cifar100, ...), a registered data set's name or id, blob:sha256:<hex>, "
        "or file:<path> (only for `python -m kdcore`)."
    )

    @classmethod
    def of(cls, source: str, options: DataOptions) -> "Dataset":
        """Return a data set that is read with these options."""
        return cls.model_validate({"source": source, **options.given()}, context=STORED)

    def resolved(self) -> "Dataset":
        """Return the data set with the default of every option written out."""
        return Dataset.model_validate({"source": self.source, **OPTION_DEFAULTS, **self.given()}, context=STORED)


class Teacher(Vocabulary):
    """A trained network: a checkpoint of a known architecture, a program of any architecture, or its logits alone."""

    checkpoint: Reference | None = Field(
        default=None,
        description="model:<name or id>, job:<id> (its student; if the job has not ended, this one waits for it), "
        "blob:sha256:<hex>, weights:<name> (published ones: weights:torchvision/resnet50, "
        "weights:ResNet50_Weights.IMAGENET1K_V1, weights:timm/resnet18.a1_in1k), or file:<path> (only for "
        "`python -m kdcore`).",
    )
    program: Annotated[str, Field(pattern=rf"^({BLOB}|{FILE}).+$"), Text(1000)] | None = Field(
        default=None,
        description="Instead of a checkpoint: blob:sha256:<hex> (or file:<path>) of a program, an ONNX model (.onnx) "
        "or one of torch.export (.pt2), that maps normalised images to logits. It has no taps: only methods on logits "
        "can use it. A registered one is named as a checkpoint, model:<name or id>.",
    )
    logits: Annotated[str, Field(pattern=rf"^({BLOB}|{FILE}).+$"), Text(1000)] | None = Field(
        default=None,
        description="Instead of a network: blob:sha256:<hex> (or file:<path>) of an .npz with the array logits: "
        "training images x classes, in the order of the data's rows and classes, of images without augmentation; or "
        "views x training images x classes, with the array views: the numbers of crop_flip's views. With test_logits "
        "the teacher is measured like any. Only methods on logits can use it.",
    )
    architecture: Architecture | None = Field(
        default=None,
        description="Not needed for a checkpoint that contains it: model:, job: and weights:. For a bare file, "
        "the default is the architecture of the same names and shapes, with a warning. `+relu256` behind a name is a "
        "hidden layer of 256 units before the classifier (also +gelu, +silu, +tanh, +linear; +bn_relu with a batch "
        "norm).",
    )
    part: Part | None = Field(
        default=None,
        description="Which weights of a checkpoint, if it holds several networks: a name of the path to them, such as "
        "student. Default: those of the registration, or the only ones that fit.",
    )
    averaged: bool | None = Field(
        default=None,
        description="True: the averaged weights (EMA, SWA) of a checkpoint that has them beside raw ones; false: the "
        "raw ones. Default: as registered, else the averaged, with a warning.",
    )
    preprocessing: Preprocessing | None = Field(
        default=None, description="Default: the checkpoint's own if it has one, else the data's mean and std."
    )
    class_names: ClassNames | None = Field(
        default=None,
        description="The names of its classes, in the order of its outputs. In another order than the data's, its "
        "outputs are put into that of the data. Default: the names in its file or registration, if there are any.",
    )
    class_map: ClassMap | None = Field(
        default=None,
        description="Which of its outputs answer each class of the data, where the classes differ: "
        '{"<class of the data>": "<its class>" or a list}; numbers of outputs, from 0, where it has no names. The '
        "probabilities of several are added, and outputs that are not named are left out of the softmax. Default: by "
        "the names, if each class of the data is found among them (ImageNet's synonyms and WordNet numbers, too), "
        "with a warning.",
    )
    image_size: int | None = Field(
        default=None,
        ge=4,
        le=1024,
        description="Height and width of its images: each is made from the picture itself, and teacher and student see "
        "the same part of it. Default: the size that its file or program notes, else the data's.",
    )
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="Its share in the averaged probabilities of several teachers. Default: equal."
    )


EVERYTHING_ELSE = "*"
"""In `Student.freeze`: everything but the classifier."""
ModulePath = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^(\*|[A-Za-z0-9_][A-Za-z0-9_.-]*)$")]


class Student(Vocabulary):
    """A network that is trained: from random weights, or from those of a checkpoint."""

    architecture: Architecture = Field(
        description="A name of GET /v1/architectures, or timm/<name>: any model of that library."
    )
    checkpoint: Reference | None = Field(
        default=None,
        description="The weights that it starts from, named as a teacher's are: model:, job: (if it has not ended, "
        "this one waits for it), blob:sha256:, weights:, file:. Taken is what has the same name and shape. The "
        "classifier starts from random weights where the classes are others.",
    )
    freeze: Annotated[tuple[ModulePath, ...], Field(max_length=1000), at_most(1000)] = Field(
        default=(),
        description="Modules of the network that are not trained, by path (layer1); they stay in eval mode, also their "
        'batch norms. "*" is everything but the classifier: what is trained then is a linear probe.',
    )
    head_lr: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        default=None,
        description="Factor of the learning rate for the parameters that the checkpoint does not give, such as a new "
        "classifier. Default: 1.",
    )
    preprocessing: Preprocessing | None = Field(
        default=None,
        description="Default: the checkpoint's own if there is one and it has one, else the data's mean and std.",
    )
    class_names: ClassNames | None = Field(
        default=None,
        description="The names of the checkpoint's classes, in the order of its outputs. Where they are the data's, "
        "the classifier is kept, in the data's order. Default: the names in its file or registration.",
    )
    part: Part | None = Field(
        default=None, description="Which weights of a checkpoint of several networks, as a teacher's."
    )
    averaged: bool | None = Field(
        default=None, description="Averaged or raw weights of a checkpoint that has both, as a teacher's."
    )


class Unlabelled(Vocabulary):
    """Images without labels, or whose labels are not used: the student learns the teacher's outputs for them."""

    source: Annotated[str, Text(300)] = Field(
        description="As a data set's source: the training images of a registered or built-in set, blob:sha256:<hex>, "
        "or file:<path>; it needs no labels."
    )
    labels: Literal["teacher", "none"] = Field(
        default="teacher",
        description="Their labels. teacher: the class with the teacher's highest probability (Kim & "
        "Rush 2016, arXiv:1606.07947). none: no label; only the distillation loss uses these images.",
    )
    labelled_too: bool = Field(
        default=True, description="True: the data set's own labelled images are trained on, too."
    )


class Sgd(Vocabulary):
    """Defaults: the CIFAR recipe of CRD (Tian et al., ICLR 2020): lr 0.05, momentum 0.9, no Nesterov. Of a student with
    a checkpoint: the usual ones of fine-tuning, lr 0.01 and weight decay 1e-4 (Li et al., ICLR 2020,
    arXiv:2002.11770, section 1)."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(
        default=0.05, gt=0, le=100, description="Learning rate. CRD's code has 0.01 for MobileNets and ShuffleNets."
    )
    momentum: Fraction = Field(default=0.9, description="Decay of the running mean of gradients.")
    weight_decay: float = Field(default=5e-4, ge=0, le=10, description="On every parameter, also those of batch norm.")
    nesterov: bool = Field(default=False, description="Nesterov's form of the momentum.")


class AdamW(Vocabulary):
    """Loshchilov & Hutter, ICLR 2019 (arXiv:1711.05101); defaults are PyTorch's, and of a student with a checkpoint a
    tenth of that lr."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, le=100, description="Learning rate.")
    weight_decay: float = Field(default=1e-2, ge=0, le=10, description="On every parameter, also those of batch norm.")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.999), description="Decay of the running means of gradients and of their squares."
    )


class Multistep(Vocabulary):
    """Multiply the learning rate by `gamma` at each milestone. Default milestones: 150, 180 and 210 of 240 epochs
    (CRD's recipe), scaled to the job's epochs."""

    name: Literal["multistep"] = "multistep"
    milestones: (
        Annotated[tuple[Annotated[int, Field(ge=1, lt=2**63)], ...], Field(fail_fast=True), Bounds(max_length=1000)]
        | None
    ) = Field(default=None, description="In epochs, in rising order.")
    gamma: float = Field(default=0.1, gt=0, le=1, description="Factor of the rate at each milestone.")
    warmup_epochs: WarmUp = 0


class Cosine(Vocabulary):
    """Half a cosine from the learning rate down to `final_fraction` of it (Loshchilov & Hutter, ICLR 2017)."""

    name: Literal["cosine"] = "cosine"
    final_fraction: float = Field(
        default=0, ge=0, le=1, description="The learning rate at the end, as a fraction of its start."
    )
    warmup_epochs: WarmUp = 0


Optimizer = Sgd | AdamW
Schedule = Multistep | Cosine


class NoAugmentation(Vocabulary):
    """Images without a change."""

    name: Literal["none"] = "none"


class CropFlip(Vocabulary):
    """Pad with black, crop at random, mirror at random: the usual augmentation of CIFAR."""

    name: Literal["crop_flip"] = "crop_flip"
    padding: int = Field(default=4, ge=0, le=64, description="Pixels on each side.")
    flip: Flip = True


class RandomResizedCrop(Vocabulary):
    """A crop of random area and aspect ratio, resized to full size (Szegedy et al., CVPR 2015)."""

    name: Literal["random_resized_crop"] = "random_resized_crop"
    scale: tuple[PartOfArea, PartOfArea] = Field(
        default=(0.35, 1.0), description="Smallest and largest part of the image's area."
    )
    ratio: tuple[WidthOverHeight, WidthOverHeight] = Field(
        default=(3 / 4, 4 / 3), description="Smallest and largest width over height."
    )
    flip: Flip = True
    store_size: int | None = Field(
        default=None,
        ge=4,
        le=4096,
        description="Height and width of the stored pictures from which crops are cut; at the image_size, small ones "
        "are blurred. Default: image_size / sqrt(smallest scale), so that no crop is enlarged, but at most 2 x "
        "image_size, the pictures' own size, and 4 GiB for all.",
    )


Augmentation = NoAugmentation | CropFlip | RandomResizedCrop


class Mixup(Vocabulary):
    """Zhang et al., ICLR 2018 (arXiv:1710.09412): blend two images and their labels."""

    name: Literal["mixup"] = "mixup"
    alpha: MixAlpha = 0.2


class Cutmix(Vocabulary):
    """Yun et al., ICCV 2019 (arXiv:1905.04899): paste a box of one image into another, labels by area."""

    name: Literal["cutmix"] = "cutmix"
    alpha: MixAlpha = 1.0


Mix = Mixup | Cutmix


class CachedViews(Vocabulary):
    """A named approximation: each image is seen in few views, so that the teacher runs once for each of them."""

    views: int = Field(ge=1, le=100_000, description="Views of each image, drawn once. Students see no others.")


TeacherCache = Annotated[
    Annotated[Literal["exact", "off"], Tag("word")] | Annotated[CachedViews, Tag("object")],
    Discriminator(_word_or_object),
]


class Training(Vocabulary):
    """The recipe of the training. Defaults: the CIFAR-100 recipe of CRD, which the published tables use; for students
    that start from a checkpoint another optimizer and schedule."""

    model_config = ConfigDict(title="Training")

    epochs: int = Field(
        default=240, ge=1, le=100_000, description="Epochs of the last stage. Stages before it have their own."
    )
    batch_size: int = Field(
        default=64, ge=2, le=65_536, description="Images in a batch. The remainder of an epoch is left out."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of first weights, held-out images, order and augmentation."
    )
    optimizer: Annotated[Optimizer, Field(discriminator="name"), named("name", Optimizer)] = Field(
        default=Sgd(), description="Default: SGD, as CRD's code."
    )
    schedule: Annotated[Schedule, Field(discriminator="name"), named("name", Schedule)] = Field(
        default=Multistep(),
        description="Schedule of the learning rate. Default: CRD's three drops; of students with a checkpoint a cosine "
        "(Kornblith et al., CVPR 2019, arXiv:1805.08974) after a warm-up of a tenth of the epochs, one at most.",
    )
    augmentation: Annotated[Augmentation, Field(discriminator="name"), named("name", Augmentation)] | None = Field(
        default=None,
        description="Default: none for built-in grey sets such as digits, crop_flip up to 64 pixels, else "
        "random_resized_crop; grey images, which may be digits or letters, are not mirrored.",
    )
    mix: Annotated[Mix, Field(discriminator="name"), named("name", Mix)] | None = Field(
        default=None, description="Mix images and their labels. Default: none, as in the published recipes."
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="Part of each label that is spread over all classes, in the labels' loss."
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Decay per step of an exponential moving average of the weights, which is exported."
    )
    batch_norm: Literal["measured", "running"] = Field(
        default="measured",
        description="The batch-norm statistics of what is evaluated, teaches later networks and is exported. measured: "
        "anew on training images, for the weights as they are (Wu & Johnson 2021, arXiv:2105.07576). running: the "
        "running averages of the training.",
    )
    clip_norm: Annotated[float, Field(gt=0, le=1e9)] | None = Field(default=None, description="Largest gradient norm.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto: bf16 autocast on a GPU that supports it and on a CPU that computes it natively, else fp32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one.")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads of the training. Default: those that are free when the job begins, at most the "
        "slot's share of the cores.",
    )
    kernels: Literal["auto", "eager"] = Field(
        default="auto",
        description="auto: fused batch norms and a folded teacher where this machine has them. eager: PyTorch's own "
        "operations alone.",
    )
    step: Literal["eager", "graph"] = Field(
        default="eager", description="graph: on a GPU, a step is captured once as a CUDA graph and replayed."
    )
    overlap: bool = Field(
        default=False,
        description="True: on a CPU, the teacher sees the next batch in a thread of its own while the student learns.",
    )
    teacher_cache: TeacherCache = Field(
        default="exact",
        description="exact: the teacher's outputs are kept by image and view, also for later jobs, and change no bit. "
        'off: they are not kept. {"views": K}: an approximation, in which each image is seen in K views only.',
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Part of the training images held out to choose the best epoch, if the data has no validation "
        "split; a validation split beside a test split is used instead.",
    )
    checkpoint_every_s: float = Field(default=30, ge=0, le=86_400, description="Seconds between checkpoints.")


Bound = Annotated[float, Field(ge=-1e9, le=1e9)]
AlertMetric = Literal[
    "validation/accuracy",
    "validation/loss",
    "train/accuracy",
    "train/loss",
    "train/label_loss",
    "train/distillation_loss",
]

OneStudent = Annotated[Student, named("architecture", Student)]

# The JSON type decides between one and several, so that a fault names only fields of that form.
OneOrSeveralTeachers = Annotated[
    Annotated[Teacher, Tag("single")]
    | Annotated[tuple[Teacher, ...], Field(min_length=1, max_length=16), at_most(16), Tag("several")],
    Discriminator(_single_or_several),
]
OneOrSeveralStudents = Annotated[
    Annotated[OneStudent, Tag("single")]
    | Annotated[tuple[OneStudent, ...], Field(min_length=1, max_length=8), at_most(8), Tag("several")],
    Discriminator(_single_or_several),
]
OneOrSeveralMethods = Annotated[
    Annotated[Method, Tag("single")]
    | Annotated[tuple[Method, ...], Field(min_length=1, max_length=8), at_most(8), Tag("several")],
    Discriminator(_single_or_several),
]


class Alert(Vocabulary):
    """A condition of which a job notifies once, also if several attempts meet it: by an event `alert` and by
    the project's webhooks (`job.alert`). Either a `metric` with a bound, or `no_progress_s`."""

    metric: AlertMetric | None = Field(default=None, description="A curve of the student: GET /v1/jobs/{id}/metrics.")
    below: Bound | None = Field(default=None, description="The alert is raised by a value of the metric below this.")
    above: Bound | None = Field(default=None, description="The alert is raised by a value of the metric above this.")
    from_epoch: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="The first epoch, counted from 1, whose values count. Default: 1."
    )
    no_progress_s: Annotated[float, Field(ge=1, le=366 * 86_400)] | None = Field(
        default=None,
        description="The alert is raised when the job has been running for so many seconds without a step, an "
        "evaluated or decoded image, or another phase. Waiting in the queue does not count.",
    )

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        if (self.metric is None) == (self.no_progress_s is None):
            raise ValueError("give a metric with below or above, or no_progress_s")
        bounds = [name for name in ("below", "above") if getattr(self, name) is not None]
        if self.metric is not None and len(bounds) != 1:
            raise ValueError(f"give either below or above with the metric {self.metric}, a number to compare it with")
        unused = [*bounds, *(["from_epoch"] if self.from_epoch is not None else [])]
        if self.metric is None and unused:
            raise ValueError(f"only a metric has {' and '.join(unused)}")
        return self


class Scheduling(Vocabulary):
    """The scheduling of the job by the service. It does not change the training; `python -m kdcore` ignores it."""

    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Jobs of the highest priority start first, then the oldest. Running jobs are not interrupted.",
    )
    deadline_s: Annotated[float, Field(gt=0, le=366 * 86_400)] | None = Field(
        default=None,
        description="Seconds after its acceptance, or last retry, within which the job must end, its waiting and "
        "pauses included; then it fails with deadline_exceeded. Default: none.",
    )
    max_attempts: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None,
        description="Attempts in a row that may end without a new checkpoint before the job fails. Default: the "
        "server's.",
    )
    alerts: Annotated[tuple[Alert, ...], Field(max_length=16), at_most(16)] = Field(
        default=(),
        description="Conditions of which the job notifies while it runs, each once. An evaluation has no metrics.",
    )


TRAINED_BASELINES = ("train", "train_anew")
"""The values of `baseline` for a student alone that the job trains itself. A resolved spec has the first."""


class JobSpec(Vocabulary):
    """One distillation: loss = alpha · cross_entropy(student, labels) + beta · distillation(student, teacher).

    A loss on the student's logits divided by T is multiplied by T², so that alpha and beta keep their meaning when T
    changes. `ttm` divides the teacher's logits only: its loss has no T².
    """

    name: Annotated[str, Text(200)] | None = Field(
        default=None, description="A name for people, of one line; it need not be unique."
    )
    labels: Labels = Field(default={})
    dataset: Annotated[Dataset, named("source", Dataset)] = Field(
        description="The images to train on and to measure every model on. A plain string is their source."
    )
    unlabelled: Annotated[Unlabelled, named("source", Unlabelled)] | None = Field(
        default=None, description="More images to train on, which need no labels. A plain string is their source."
    )
    teacher: OneOrSeveralTeachers | None = Field(
        default=None,
        description="The trained network; some methods take none (GET /v1/methods). The probabilities of a list are "
        "averaged, by weight: only methods on logits can use a list.",
    )
    assistants: Annotated[tuple[OneStudent, ...], Field(max_length=8), at_most(8)] = Field(
        default=(),
        description="Networks between teacher and student, largest first: each is distilled from the one before "
        "(Mirzadeh et al., AAAI 2020, arXiv:1902.03393).",
    )
    student: OneOrSeveralStudents = Field(
        description="The network to train. A list for networks that teach each other (dml); the first is the result."
    )
    method: OneOrSeveralMethods = Field(
        description="A name, or an object with a name and the method's options. A list is a sum: each method's loss "
        "times its weight, and beta times the sum."
    )
    temperature: Annotated[float, Field(gt=0, le=1000), Bounds(ge=1e-3)] | None = Field(
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
        description="Weight of the distillation loss. Default: the method's own (GET /v1/methods); 1 where methods "
        "have weights of their own, as in a list of several.",
    )
    training: Training = Field(default=Training(), description="The recipe of the training.")
    baseline: Annotated[str, Field(pattern=r"^(none|train|train_anew|(job|blob|file):.+)$"), Text(1000)] = Field(
        default="none",
        description="none, train (the same student, recipe and seed without the teacher; if an earlier job of the "
        "project has trained just that, its student is taken, with a warning), train_anew, or job:<id>: of an "
        "earlier job, a supervised one, or one that trained its own student alone, with the same network, data, recipe "
        "and seed; for `python -m kdcore` also file:<path> of its weights.",
    )
    seeds: int = Field(
        default=1,
        ge=1,
        le=32,
        description="Runs of the student, and of its baseline, with seeds training.seed, training.seed + 1, and so on: "
        "the report gives an interval over them. The first is delivered. Assistants are trained once.",
    )
    quantization: Quantization | None = Field(
        default=None, description="Training for int8; the student alone is trained in the same way."
    )
    export: Formats = Field(default=("safetensors",), description="The files of the student that the job delivers.")
    export_options: ExportOptions = Field(default=ExportOptions(), description="How these files are made and measured.")
    documents: Documents = Field(
        default=("html", "model_card"),
        description="What the job delivers beside report.json. html: the report as one page, report.html. model_card: "
        "model_card.zip, a folder for the Hugging Face Hub. tensorboard: tensorboard.zip, the curves as event files.",
    )
    strict: bool = Field(
        default=False,
        description="True: a warning that is known before the training is an error, warning_refused.",
    )
    scheduling: Scheduling = Field(default=Scheduling(), description="The scheduling of the job by the service.")

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
        """The students; the first is the result of the job."""
        return self.student if isinstance(self.student, tuple) else (self.student,)

    @property
    def trains_baseline(self) -> bool:
        return self.baseline in TRAINED_BASELINES

    @property
    def method_name(self) -> str:
        """The names of all methods, as in `kd+attention`."""
        return "+".join(method.name for method in self.methods)

    @property
    def scheme(self) -> SchemeOptions:
        """The scheme: which model teaches which."""
        return scheme_of(self.methods)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
