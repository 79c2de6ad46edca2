"""The shape of what is known about a data set, a model file, an architecture or a method. Torch-free."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    """Facts are looked up or measured, never edited."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DatasetFacts(Facts):
    """What an inspection saw in a data set, or what is published about a named one."""

    kind: Literal["arrays", "folders", "named"]
    labelled: bool = True
    """False for images alone, which can be distilled onto but not measured on: no classes, no test split."""
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
    """True where the data had no test split and a tenth of the training images was set aside."""
    mean: list[float]
    """Per channel, of pixels scaled to 0..1, over the training split."""
    std: list[float]
    digest: str | None = None
    """`sha256:<hex>` of the file; None for a named set that has not been fetched yet."""


class ModelFacts(Facts):
    """What an inspection saw in a checkpoint."""

    architecture: str
    num_classes: int
    channels: int
    parameters: int
    bytes: int
    format: Literal["safetensors", "pytorch"]
    mean: list[float] | None = None
    """The normalisation that the model was trained with, where the file says so."""
    std: list[float] | None = None
    class_names: list[str] | None = None
    digest: str | None = None


class ArchitectureFacts(Facts):
    """What is known about a network before it is built."""

    name: str
    source: Literal["kdcore", "torchvision", "timm"]
    family: str
    min_image: int
    """The smallest height and width in pixels that the network's strides allow."""
    max_image: int | None = None
    """The largest, for networks that take one image size only."""
    channels: Literal["any", 3]
    taps: list[str] = []
    """Taps of the stage ends, shallow to deep; each gives maps N x C x H x W."""
    tap_widths: list[int] = []
    """Channels at each of `taps`."""
    preactivations: list[str] = []
    """Taps of the stage ends before their ReLU, one for each of `taps`, as wide; of a stage that ends without a ReLU,
    the end itself. Empty where the network has no such places, or they cannot be tapped."""
    margins: list[str] = []
    """Module paths of the batch norms that feed `preactivations`, alone or as one summand. Empty where none do."""
    embedding: str | None = None
    """Tap of the penultimate activation: the classifier's input, such as `fc@in`."""
    embedding_width: int | None = None
    body_parameters: int | None = None
    """All parameters but the stem's input-channel part and the classifier."""
    stem_parameters_per_channel: int | None = None

    def parameters(self, num_classes: int, channels: int = 3) -> int | None:
        """Exact parameter count; None where only building the network can tell."""
        if self.body_parameters is None or self.stem_parameters_per_channel is None or self.embedding_width is None:
            return None
        classifier = num_classes * (self.embedding_width + 1)
        return self.body_parameters + channels * self.stem_parameters_per_channel + classifier


class TapFacts(Facts):
    """What the taps of a network give."""

    shapes: dict[str, list[int]]
    """For one image, by path."""


class NamedDataset(Facts):
    """A data set that the engine fetches by name."""

    name: str
    title: str
    source: Literal["bundled", "torchvision"]
    num_classes: int
    class_names: list[str] = []
    """Empty where they are known only once the data is fetched."""
    channels: int
    image_size: tuple[int, int]
    """Native size, or the size that images of differing sizes are brought to."""
    resizable: bool = False
    """True where images differ in size, so that a job may ask for another `image_size`."""
    train: int
    test: int
    mean: list[float]
    std: list[float]
    licence: str


Need = Literal["logits", "labels", "maps", "embedding", "preactivations", "batch_norm", "sample_index"]
TapKind = Literal[
    "none", "embedding", "last_stage", "middle_stage", "stages", "flows", "preactivations", "margins", "review"
]


class MethodFacts(Facts):
    """What a method is, what it needs of a job, and the weights that it has where a job names none."""

    name: str
    """What a job calls it."""
    title: str
    paper: str
    """Citation."""
    family: Literal["reference", "response", "features", "relations", "schemes"]
    matches: str
    """What of the teacher the student is asked to match."""
    scheme: Literal["alone", "offline", "mutual", "ensemble", "exits", "generations"] = "offline"
    """Who teaches whom. alone: nobody. offline: a trained teacher. mutual: students each other. ensemble: branches of
    one student, all together. exits: a student's deepest part its shallower ones. generations: each the next."""
    teacher: Literal["required", "optional", "none"] = "required"
    """Whether a job names a teacher."""
    needs: list[Need]
    """What it looks at, with its options as they are by default."""
    taps: TapKind = "none"
    """Which activations of student and teacher it compares where a job names none."""
    takes: Literal["anything", "maps", "maps_or_vectors"] = "anything"
    """What a tap that a job names has to give for each image: maps are channels x height x width, and a vector may
    count as a map of one place."""
    alpha: float
    """Weight of the labels' loss where a job says none."""
    beta: float | None
    """Weight of its own loss where a job says none; null where there is no distillation loss."""
    temperature: float | None = None
    """Where a job says none; null where there is none to choose."""
    defaults_from: str
    """Whose weights, temperature and options the defaults are."""
    owns: str = "nothing"
    """What is trained beside the student and never exported."""
    cost: str
