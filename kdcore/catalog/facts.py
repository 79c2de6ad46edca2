"""The facts of a data set, a model file or an architecture, as published or from an inspection."""

from math import isqrt
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

DATASET_READING = 4
"""The number of the rules by which files are read as data sets: a part of the key of every stored inspection and of
every decoded file. Increase it when the same file is read as something else, or decoded to other bytes, than before."""

MODEL_READING = 3
"""The number of the rules by which files are read as models: a part of the key of every stored inspection of one.
Increase it when a file is loaded, or refused, otherwise than before, or when its facts are others."""


class Facts(BaseModel):
    """The base class of facts. They are never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LeftOut(Facts):
    """A part of a file that is not used."""

    what: str
    """A folder, an array, a table, or a kind of file; or a part of a published set that the file lacks."""
    count: int
    """Its images, rows or files; 0 for a part that is not there."""
    why: str


class DatasetFacts(Facts):
    """The facts of a data set, from an inspection or, of a named set, as published."""

    kind: Literal["arrays", "folders", "named"]
    labelled: bool = True
    """False for images without labels: no classes and no test split. They can only be used as unlabelled images."""
    num_classes: int
    class_names: list[str]
    channels: int
    image_size: tuple[int, int]
    """Height and width in pixels."""
    train: int
    """Images in the training split."""
    test: int
    """Images in the test split."""
    test_carved: bool = False
    """True if the data had no test split and a tenth of the training images was set aside."""
    validation: int = 0
    """Images of a validation split beside the test split. It chooses the best epoch; if there is none, a part of the
    training split does."""
    layout: str = ""
    """How the file is laid out, such as `<split>/<class>/<image>` or `arrays`; empty for a named set."""
    splits: dict[str, int] = {}
    """The names of the splits as they were found (folders, arrays or values of a table), with their images: training,
    validation if there is one, test."""
    class_counts: dict[str, list[int]] = {}
    """By split (train, val, test): the images of each class, in the order of `class_names`."""
    left_out: list[LeftOut] = []
    """Everything in the file that is not used, without text files and hidden files."""
    merged: list[str] = []
    """Folders whose names differed only in their Unicode form or in blanks at their ends: they were read as one."""
    repeated: list[str] = []
    """Two or more folders that are inside of each class folder. Their images belong to the class around them."""
    respelled: int = 0
    """Image files whose names in a table differ in case or suffix: `a.JPG` in the table, `a.jpg` in the archive."""
    respelled_names: dict[str, str] = {}
    """The first of them: the table's name, and that of the file."""
    mean: list[float]
    """Per channel, of pixels scaled to 0..1, over the training split."""
    std: list[float]
    digest: str | None = None
    """`sha256:<hex>` of the file; None for a named set that has not been fetched yet."""
    grey: bool = False
    """True if all training images are grey, also if they are read with three equal channels."""
    largest: int | None = None
    """The largest value, of 255, of all pixels of the training split. None if an earlier version inspected them."""
    pictures: dict[str, int] = {}
    """How many image files are of a kind: grey, colour; alpha (with transparent parts, read over white), palette, cmyk,
    sixteen_bit (grey with more than 8 bits, scaled by its own range), oriented (with a tag to turn it), animated (its
    first frame is read), cut (resized by a crop that leaves out more than a tenth)."""
    pixels_cut: float = 0.0
    """The share of all pixels that the crop leaves out."""
    own_side: int | None = None
    """The side, in pixels of the file, of the square that is read of a picture: at least half of the pictures have as
    much. None if images are not resized, or were inspected by an earlier version."""
    skipped: int = 0
    """Image files that could not be read and were left out, as `skip_unreadable` says."""
    skipped_names: list[str] = []
    """The first of them."""
    options: dict[str, Any] = {}
    """The options that the registration gave. Jobs that name the data set use them."""
    reading: int = 1
    """The `DATASET_READING` by which a file was read. At submit, a file with an earlier one is read again."""

    @property
    def resized_to(self) -> int | None:
        """The size to which images from folders may have been resized; None for others, and if it is no square."""
        height, width = self.image_size
        return height if self.kind == "folders" and height == width else None

    @property
    def is_outdated(self) -> bool:
        """True if the file may be read as something else now."""
        return self.reading != DATASET_READING

    def with_three_channels(self) -> "DatasetFacts":
        """Return the facts of grey images when they are read with three equal channels."""
        return self.model_copy(update={"channels": 3, "grey": True, "mean": self.mean * 3, "std": self.std * 3})


class Loading(Facts):
    """How the tensors of a checkpoint became those of its network."""

    tensors: int
    """The number that was taken, parameters and buffers."""
    removed: list[str] = []
    """Names that stood before those of the network, or between them."""
    part: str | None = None
    """The path to the weights in the file, if it holds several networks of this architecture; `.` is the file itself.
    As `part` it chooses them again."""
    averaged: bool | None = None
    """True if averaged weights (EMA, SWA) were taken; False for the raw ones beside them; None if there is one kind."""
    averaged_by_default: bool = False
    """True if nobody chose between averaged and raw ones."""
    mapped: int = 0
    """Tensors that the file has under other names."""
    mapped_names: dict[str, str] = {}
    """The first of them: the network's name, and that in the file."""
    by_order: bool = False
    """True if the names say nothing: shapes and order are those of the network."""
    ignored: int = 0
    """Tensors that are no part of the network."""
    ignored_names: list[str] = []
    """The first of them."""
    precision: str = "float32"
    """Of the numbers in the file. They are computed with in float32."""
    architecture_found: bool = False
    """True if nobody named the architecture, and it was found by names and shapes."""
    similar: list[str] = []
    """Other architectures of the same names and shapes, if it was found."""
    activation_guessed: str | None = None
    """The activation that was assumed in a classifier of several layers; None if there is none, or it was named."""
    missing: int = 0
    """Tensors of the network that the file does not have. Only weights to start from may lack some."""


class ModelFacts(Facts):
    """The facts of a checkpoint, from an inspection."""

    architecture: str
    num_classes: int
    channels: int
    parameters: int
    bytes: int
    format: Literal["safetensors", "pytorch"]
    mean: list[float] | None = None
    """The normalisation that the model was trained with; None if the file does not contain it."""
    std: list[float] | None = None
    class_names: list[str] | None = None
    """In the order of its outputs; None if neither the file nor its registration names them."""
    image_size: tuple[int | None, int | None] | None = None
    """Height and width in pixels of the images that it learned from; None if the file does not say it."""
    digest: str | None = None
    loading: Loading | None = None
    """How the file's tensors became the network's; None for a program, and for facts that an earlier version stored."""

    @property
    def field(self) -> Literal["checkpoint", "program", "logits"]:
        """The field of a spec's teacher that names the file."""
        return "checkpoint"


class PublishedFacts(ModelFacts):
    """The facts of weights that a library publishes, as it states them: nothing is downloaded for them."""

    file: str
    """The published name of the file: `resnet18-f37072fd.pth`, `timm/resnet18.a1_in1k/model.safetensors`."""


class StartFacts(Facts):
    """What a network can take over from a checkpoint: the parameters and statistics of the same name and shape."""

    num_classes: int | None = None
    """Classes of the checkpoint; None if it has no classifier that could be compared."""
    channels: int | None = None
    """Channels of the images of the checkpoint; None if its first layer could not be compared."""
    mean: list[float] | None = None
    std: list[float] | None = None
    class_names: list[str] | None = None
    """In the order of the checkpoint's outputs; None if they are not known."""
    digest: str | None = None
    loading: Loading | None = None
    """How the file's tensors became those of the network; None if there is no file yet."""
    parameters: int
    """All parameters of the network."""
    taken: int
    """Those that fit by name and shape, the classifier's among them."""
    classifier_taken: int
    """The classifier's alone."""
    fresh: list[str]
    """Names of the network's parameters that the checkpoint does not give."""
    classifier: list[str]
    """Names of the classifier's parameters: those whose shape depends on the number of classes."""
    frozen: int = 0
    """Parameters in the modules that are to be frozen."""
    frozen_classifier: int = 0
    """Those among them that are the classifier's."""
    frozen_fresh: list[str] = []
    """Names of frozen parameters that the checkpoint does not give."""
    unknown_modules: dict[str, list[str]] = {}
    """The modules to be frozen that the network does not have, each with similar paths that it has."""


class NamedStartFacts(StartFacts):
    """The same for weights whose file is not here yet: from the names and shapes of the network that they belong to."""


PROGRAM_FORMATS = {"pt2": "a torch.export program", "onnx": "an ONNX model"}


class ProgramFacts(ModelFacts):
    """The facts of a program, a file that holds a network's graph, from an inspection. It is its own architecture."""

    architecture: str = "program"
    format: Literal["pt2", "onnx"] = "pt2"  # type: ignore[assignment]  # no formats of checkpoints
    """pt2: of torch.export."""
    image_size: tuple[int | None, int | None]
    """Height and width in pixels; None if the program takes any."""
    batch: int | Literal["any"] = "any"
    """The largest batch that it was exported for. An ONNX model takes no other: it gets the images in such pieces."""
    outputs: Literal["logits", "probabilities"] = "logits"
    """What the file returns. The engine takes the logarithm of probabilities."""

    @property
    def field(self) -> Literal["checkpoint", "program", "logits"]:
        return "program"

    @property
    def kind(self) -> str:
        """What the file is, in words."""
        return PROGRAM_FORMATS[self.format]

    def takes(self, image_size: tuple[int, int]) -> bool:
        return all(own in (None, requested) for own, requested in zip(self.image_size, image_size, strict=True))


class LogitsFacts(ModelFacts):
    """The facts of a file of logits in the place of a teacher, from an inspection. It has no network."""

    architecture: str = "logits"
    format: Literal["npz"] = "npz"  # type: ignore[assignment]  # no format of checkpoints
    channels: int = 0
    """0: it takes no images."""
    parameters: int = 0
    train: int
    """Rows: training images."""
    test: int | None = None
    """Rows of `test_logits`; None if the file has none."""
    views: int | None = None
    """Views of each training image; None for logits of the images without augmentation."""
    labels: bool = False
    """True if the file has labels of its rows, which are compared with the data's."""

    @property
    def field(self) -> Literal["checkpoint", "program", "logits"]:
        return "logits"

    @property
    def plain_view(self) -> int:
        """The number of the view that is the image itself: the middle place of a crop, not mirrored."""
        flips = 2 if (self.views or 1) % 2 == 0 else 1
        side = isqrt((self.views or 1) // flips)
        return (side // 2 * side + side // 2) * flips


def model_facts(stored: Any) -> ModelFacts:
    """Return the facts of a checkpoint or of a program, from their JSON. Raises ValidationError."""
    is_program = isinstance(stored, dict) and stored.get("format") in PROGRAM_FORMATS
    return (ProgramFacts if is_program else ModelFacts).model_validate(stored)


class ArchitectureFacts(Facts):
    """The facts of a network that are known before it is built."""

    name: str
    source: Literal["kdcore", "torchvision", "timm"]
    family: str
    min_image: int
    """The smallest height and width in pixels that the network's strides allow."""
    max_image: int | None = None
    """The largest height and width, for networks that take one image size only."""
    channels: Literal["any", 3]
    taps: list[str] = []
    """Taps of the stage ends, shallow to deep; each gives maps N x C x H x W."""
    tap_widths: list[int] = []
    """Channels at each of `taps`."""
    preactivations: list[str] = []
    """Taps of the stage ends before their ReLU, one for each of `taps` and of the same width. For a stage that ends
    without a ReLU it is the end itself. Empty if the network has no such places, or they cannot be tapped."""
    margins: list[str] = []
    """Module paths of the batch norms that feed `preactivations`, alone or as one summand. Empty if there are none."""
    embedding: str | None = None
    """Tap of the penultimate activation: the classifier's input, such as `fc@in`."""
    embedding_width: int | None = None
    body_parameters: int | None = None
    """All parameters but the stem's input-channel part and the classifier."""
    stem_parameters_per_channel: int | None = None

    def parameters(self, num_classes: int, channels: int = 3) -> int | None:
        """Return the exact number of parameters; None if the network must be built to count them."""
        if self.body_parameters is None or self.stem_parameters_per_channel is None or self.embedding_width is None:
            return None
        classifier = num_classes * (self.embedding_width + 1)
        return self.body_parameters + channels * self.stem_parameters_per_channel + classifier


class TapFacts(Facts):
    """The shapes at the taps of a network."""

    shapes: dict[str, list[int]]
    """The shape for one image, by path."""


class NamedDataset(Facts):
    """A data set that the engine fetches by name."""

    name: str
    title: str
    source: Literal["bundled", "torchvision"]
    num_classes: int
    class_names: list[str] = []
    """Empty if they are known only after the data is fetched."""
    channels: int
    image_size: tuple[int, int]
    """The native size, or the size to which images of different sizes are resized."""
    resizable: bool = False
    """True if images differ in size: a job may give another `image_size`."""
    train: int
    test: int
    mean: list[float]
    std: list[float]
    licence: str
