"""The recipe of a training: optimizer, schedule, augmentation, precision, and how it is computed."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from kdcore.spec.vocabulary import Bounds, Vocabulary, named


def _word_or_object(given: Any) -> str:
    return "object" if isinstance(given, dict | CachedViews) else "word"


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
    batch_norm: Literal["views", "measured", "running"] | None = Field(
        default=None,
        description="The batch-norm statistics of what is evaluated, teaches later networks and is exported. views: "
        "anew on augmented training images, for the weights as they are (Wu & Johnson 2021, arXiv:2105.07576). "
        "measured: anew on training images without augmentation. running: the running averages of the training. "
        "Default: views for crop_flip, whose black margins the test images do not have, else measured.",
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
