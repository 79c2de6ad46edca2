"""What a job is given: data sets, teachers and students, and the types of their fields."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from base.references import BLOB, FILE, REFERENCE_PREFIXES
from base.text import PATTERN, STORED, Text, shown, unwanted
from kdcore.catalog import architecture
from kdcore.spec.vocabulary import Bounds, Vocabulary, at_most


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
