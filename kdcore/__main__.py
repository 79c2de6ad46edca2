"""The engine's command line, for users and for workers.

    python -m kdcore run SPEC.json --out DIR [--input REF=PATH]... [--resume CHECKPOINT] [--cache DIR] [--known FILE]
    python -m kdcore run --wait N           the same; its arguments come over the socket N (`protocol.py`)
    python -m kdcore evaluate STUDENT.safetensors --dataset digits [--image-size N] [--options JSON]
                              [--input REF=PATH]... [--architecture NAME]
    python -m kdcore images FILE.safetensors --dataset digits [--split train|test] [--image-size N] [--options JSON]
                              [--input REF=PATH]...
    python -m kdcore inspect model PATH [--architecture NAME] [--part NAME] [--averaged true|false] [--progress]
                                                    a checkpoint or a program, as its bytes say
    python -m kdcore inspect program PATH [--progress]   an ONNX model or a torch.export program only
    python -m kdcore inspect logits PATH [--progress]    an .npz of logits in the place of a teacher
    python -m kdcore inspect dataset PATH [--image-size N] [--options JSON] [--progress] [--thumbnails FILE.png]
    python -m kdcore inspect architecture NAME --classes K --channels C --image-size H W
    python -m kdcore inspect taps --classes K --channels C --image-size H W -- NAME PATH...
    python -m kdcore inspect published NAME    facts of published weights, without a download
    python -m kdcore inspect start PATH --architecture NAME --classes K --channels C [--freeze PATH...]
                                                    and, as of a model, --part, --averaged, --progress
    python -m kdcore inspect named-start weights:NAME --architecture ... (as start)
    python -m kdcore inspect named-start NAME --from-classes K --from-channels C --architecture ... (as start)
    python -m kdcore inspect --arguments FILE   the same; FILE is a JSON list of the arguments after `inspect`
    python -m kdcore inspect cost REQUEST   JSON: {"spec": a resolved spec, "dataset": facts of its data, "threads": N}

`run` writes one JSON object in each line: exit 0 after `done`, 1 after `error`, 75 if SIGTERM stopped it and a
checkpoint is saved. Its spec is that of a distillation, or, with a `kind`, of a job that trains nothing: `evaluation`
measures a model, `export` writes files of a job's student, `benchmark` measures the speed of a network; `prediction`,
which is no job, is a job's models on one image.
`images` writes the test images of a data set, to check a student outside of the engine, or its training images, to run
a teacher there; both in the order of their rows. It,
`evaluate` and `inspect` print one JSON object; with --progress, lines {"progress": {"done": images, "total": images}}
come before it, one a second, and first one of 0 of 0 when the file is opened, after all imports. --thumbnails writes a
sheet of some images, and its places are beside the facts.
"""

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from base.data_cache import TEACHER_MAX_BYTES
from base.errors import (
    DatasetUnreadable,
    EngineError,
    Internal,
    OutOfMemory,
    SpecInvalid,
    TeacherMismatch,
)
from base.files import DISK_FULL, storage_full, too_many_files
from base.processes import importing
from base.text import STORED, all_shown, shown, unwanted
from kdcore import protocol
from kdcore.protocol import KnownBefore, Lines
from kdcore.spec import (
    BenchmarkSpec,
    DataOptions,
    Dataset,
    EvaluationSpec,
    ExportSpec,
    JobSpec,
    KindSpec,
    parse,
    parse_evaluation,
)
from kdcore.spec.cost import ProbeRequest
from kdcore.spec.kinds import PredictionSpec

PROGRESS_S = 1.0
ANSWER_BYTES = 2 << 20
"""The most that an inspection says: it is stored with the file's row, and shown with it."""
NO_MEMORY = "can't allocate memory"
"""A part of the message of the CPU's allocator, which raises a plain RuntimeError; a GPU's has its own error class."""


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:2] == ["inspect", "--arguments"]:
        given = ["inspect", *json.loads(Path(given[2]).read_text())]
    arguments = _parser().parse_args(given)
    verb: Callable[[argparse.Namespace], int] = arguments.verb
    return verb(arguments)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.wait is not None:
        return main(["run", *protocol.receive_order(arguments.wait, _import_all)])
    if arguments.spec is None or arguments.out is None:
        arguments.refuse("give SPEC.json and --out DIR, or --wait N")
    lines = Lines(_events(arguments.events_fd))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        lines.phase("validating")
        spec = _spec(arguments.spec)
        # Torch is imported only for a valid spec, so that an invalid one fails at once.
        began = time.monotonic()
        with importing():
            from kdcore import prepare
            from kdcore.checkpoint import stop_on_sigterm

            run_spec = _runner(spec)

        imports_s = time.monotonic() - began
        cache = arguments.cache or arguments.out / "cache"
        known = KnownBefore.read(arguments.known) if arguments.known else protocol.NOTHING_KNOWN
        workspace = prepare.Workspace(
            arguments.out,
            dict(arguments.input),
            cache,
            lines,
            known,
            arguments.cache_max_bytes,
            arguments.teacher_cache_max_bytes,
        )
        workspace.seconds["imports"] = imports_s
        stop_on_sigterm(workspace)
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = run_spec(workspace, arguments.resume)
    except Exception as error:
        engine_error = _engine_error(error)
        lines.emit("error", **engine_error.as_dict())
        if isinstance(engine_error, Internal):
            raise
        return 1
    lines.emit("done", report=report)
    return 0


def _import_all() -> None:
    """Import what any job needs. This touches no device and starts no thread."""
    with importing():
        from kdcore import run  # noqa: F401


def _evaluate(arguments: argparse.Namespace) -> int:
    with importing():
        from kdcore.measure.evaluate import evaluate_checkpoint

    return _print(
        lambda: evaluate_checkpoint(
            arguments.path, arguments.architecture, _dataset(arguments), _workspace_of_files(arguments)
        )
    )


def _images(arguments: argparse.Namespace) -> int:
    with importing():
        from kdcore.measure.evaluate import write_images

    return _print(
        lambda: write_images(arguments.path, _dataset(arguments), _workspace_of_files(arguments), arguments.split)
    )


def _workspace_of_files(arguments: argparse.Namespace) -> Any:
    """Return the workspace of a verb that writes no folder of its own."""
    from kdcore.prepare import Workspace

    room = arguments.cache_max_bytes
    return Workspace(Path(), dict(arguments.input), arguments.cache, Lines(sys.stderr), cache_max_bytes=room)


def _inspect(arguments: argparse.Namespace) -> int:
    """Print facts, or the error that makes the file or network unusable: exit 0 for both."""

    def found() -> dict[str, Any]:
        places: dict[str, Any] = {}
        facts = _facts(arguments, places)
        of_data = arguments.kind == "dataset"
        _require_text(getattr(facts, "class_names", None) or (), of_data=of_data)
        answer = {"ok": True, "facts": facts.model_dump(mode="json"), **places}
        size = len(json.dumps(answer))
        if size > ANSWER_BYTES:
            error = DatasetUnreadable if of_data else TeacherMismatch
            text = f"what the file says of itself (names, notes) has {size:,} bytes; the most is {ANSWER_BYTES:,}"
            raise error(text, hint="leave notes out, or give shorter names")
        return answer

    return _print(found, exit_on_error=0)


def _require_text(class_names: Sequence[str], *, of_data: bool) -> None:
    """Raise the file's error for a name that no database can store, or that a terminal would obey."""
    for number, name in enumerate(class_names):
        if fault := unwanted(name):
            error = DatasetUnreadable if of_data else TeacherMismatch
            raise error(f"the name of class {number}, {shown(name)}: {fault}", hint="rename the class in the file")


def _facts(of: argparse.Namespace, places: dict[str, Any]) -> Any:
    """Return the facts of a file or a network. Each kind imports only the modules that it needs."""
    match of.kind:
        case "model" | "program":
            return _facts_of_model(of)
        case "logits":
            with importing():
                from kdcore import stored_logits

            _begin(of)
            return stored_logits.inspect(of.path)
        case "dataset":
            with importing():
                from kdcore import data

            _begin(of)
            # The imported modules are garbage at no time; among many pictures, looking for some in them takes seconds.
            gc.freeze()
            sheet = data.Thumbnails() if of.thumbnails else None
            facts = data.inspect(of.path, _data_options(of), _Progress() if of.progress else None, sheet)
            if sheet is not None:
                places["thumbnails"] = sheet.write(of.thumbnails)
            return facts
        case "published" | "start" | "named-start":
            return _facts_of_weights(of)
        case "cost":
            with importing():
                from kdcore.measure.probe import probe

            return probe(ProbeRequest.model_validate_json(of.request))
        case _:
            with importing():
                from kdcore import models

            network = of.name, of.classes, of.channels, _height_width(of)
            return models.inspect_taps(*network, of.paths) if of.kind == "taps" else models.inspect(*network)


def _facts_of_model(of: argparse.Namespace) -> Any:
    """Return the facts of a checkpoint or a program."""
    with importing():
        from kdcore import programs, weights

    _begin(of)
    # A program needs no option; whether one was given all the same is for the caller to say.
    if of.kind == "program" or programs.is_program(of.path):
        return programs.inspect(of.path)
    return weights.inspect(of.path, of.architecture, of.channels, weights.Choice(of.part, _averaged(of)))


def _averaged(of: argparse.Namespace) -> bool | None:
    return None if of.averaged is None else of.averaged == "true"


def _facts_of_weights(of: argparse.Namespace) -> Any:
    """Return the facts of published weights, or what of weights a network can start from."""
    with importing():
        from kdcore.weights import Choice, published, starting

    if of.kind == "published":
        return published.inspect(of.name)
    shape = starting.Shape(of.architecture, of.classes, of.channels, tuple(of.freeze))
    if of.kind == "start":
        _begin(of)
        return starting.inspect(of.path, shape, Choice(of.part, _averaged(of)))
    if of.name.startswith(published.PREFIX):
        return starting.inspect_published(of.name, shape)
    return starting.inspect_named(of.name, of.from_classes, of.from_channels, shape)


def _begin(of: argparse.Namespace) -> None:
    """Say that the file is opened now: the imports before it take seconds on a busy machine."""
    if of.progress:
        _print_progress(0, 0)


def _print_progress(done: int, total: int) -> None:
    print(json.dumps({"progress": {"done": done, "total": total}}), flush=True)


class _Progress:
    """Prints the progress of an inspection as a JSON object in a line of its own, at most once in PROGRESS_S."""

    def __init__(self) -> None:
        self._printed_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._printed_at >= PROGRESS_S:
            self._printed_at = time.monotonic()
            _print_progress(done, total)


def _add_data_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--image-size", type=int)
    verb.add_argument("--options", default="{}", metavar="JSON", help="the other options of a spec's dataset")


def _data_options(arguments: argparse.Namespace) -> DataOptions:
    """Return how a data set is read: the size, and the other options as JSON. Raises SpecInvalid."""
    try:
        given = json.loads(arguments.options)
    except ValueError as error:
        raise SpecInvalid(f"--options is no JSON: {error}", hint='write it as {"resize": "pad"}') from error
    if not isinstance(given, dict):
        raise SpecInvalid(f"--options is no JSON object: {arguments.options}", hint='write it as {"resize": "pad"}')
    try:
        return DataOptions.model_validate({"image_size": arguments.image_size, **given}, context=STORED)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        option = "/".join(map(str, detail["loc"]))
        raise SpecInvalid(f"the data set's option {option}: {detail['msg']}, got {detail['input']!r}") from error


def _dataset(arguments: argparse.Namespace) -> Dataset:
    return Dataset.of(arguments.dataset, _data_options(arguments))


def _height_width(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return height and width; a single number is the side of a square."""
    return arguments.image_size[0], arguments.image_size[-1]


def _print(answer: Callable[[], dict[str, Any]], exit_on_error: int = 1) -> int:
    """Print one JSON object. An unexpected exception still ends in a traceback."""
    try:
        printed, code = answer(), 0
    except Exception as error:
        engine_error = _engine_error(error)
        if isinstance(engine_error, Internal):
            raise
        option = {"option": engine_error.option} if isinstance(engine_error, DatasetUnreadable) else {}
        printed, code = {"ok": False, "error": engine_error.as_dict() | option}, exit_on_error
    print(json.dumps(all_shown(printed)))
    return code


def _engine_error(error: Exception) -> EngineError:
    """Return the engine's own error for any exception."""
    # A library's error, or a reader's own about the file, may hide it.
    if (exhausted := too_many_files(error)) is not None:
        return exhausted
    if isinstance(error, EngineError):
        return error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in str(error):
        return OutOfMemory(str(error) or "out of memory", hint="a smaller training.batch_size or network needs less")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return storage_full(error, str(error.filename or "a file"))
    return Internal(f"{type(error).__name__}: {error}")


PARSERS: Mapping[str, Callable[..., JobSpec | KindSpec]] = {
    "distillation": parse,
    "evaluation": parse_evaluation,
    "export": ExportSpec.parse,
    "benchmark": BenchmarkSpec.parse,
    "prediction": PredictionSpec.parse,
}
"""By the field `kind` of a spec; one without it is a distillation. What runs them is in `_runner`."""


def _spec(path: Path) -> JobSpec | KindSpec:
    """Read the spec of a job."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpecInvalid(f"{path} holds no JSON: {error}") from error
    kind = body.get("kind", "distillation") if isinstance(body, dict) else "distillation"
    if not isinstance(kind, str) or kind not in PARSERS:
        raise SpecInvalid(f"there is no kind of job {kind!r}", hint=f"kind is one of {', '.join(PARSERS)}")
    return PARSERS[kind](body, stored=True)


def _runner(spec: JobSpec | KindSpec) -> Callable[[Any, Path | None], dict[str, Any]]:
    """Return what runs a spec, given its workspace and the checkpoint to resume from. Imports what its kind needs."""
    match spec:
        case JobSpec():
            from kdcore import run

            return lambda workspace, resume: run.run(spec, workspace, resume)
        case EvaluationSpec():
            from kdcore.measure import evaluate

            return lambda workspace, _: evaluate.run_evaluation(spec, workspace)
        case ExportSpec():
            from kdcore.exports import job

            return lambda workspace, _: job.run_export(spec, workspace)
        case BenchmarkSpec():
            from kdcore.measure import benchmark

            return lambda workspace, _: benchmark.run_benchmark(spec, workspace)
        case PredictionSpec():
            from kdcore.measure import predicting

            return lambda workspace, _: predicting.run_prediction(spec, workspace)
    raise AssertionError(f"no kind in PARSERS makes a {type(spec).__name__}")


def _events(descriptor: int | None) -> Any:
    """Return the stream for the lines. Without a descriptor it is stdout; all other output then goes to stderr."""
    if descriptor is not None:
        return os.fdopen(descriptor, "w", buffering=1)
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def _input(text: str) -> tuple[str, Path]:
    reference, equals, path = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not REFERENCE=PATH")
    return reference, Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kdcore", description="The distillation engine.")
    verbs = parser.add_subparsers(required=True)

    run = verbs.add_parser("run", help="run one job")
    run.set_defaults(verb=_run, refuse=run.error)
    run.add_argument("spec", type=Path, nargs="?")
    run.add_argument("--out", type=Path)
    run.add_argument("--resume", type=Path)
    run.add_argument(
        "--wait", type=int, metavar="N", help="receive the other arguments over this socket, from a worker"
    )
    run.add_argument("--events-fd", type=int)
    run.add_argument("--known", type=Path, help="what the service knows about the job already (protocol.KnownBefore)")

    evaluate = verbs.add_parser("evaluate", help="measure a checkpoint on a data set's test images")
    evaluate.set_defaults(verb=_evaluate)
    evaluate.add_argument("path", type=Path)
    evaluate.add_argument("--dataset", required=True)
    evaluate.add_argument("--architecture", help="for a checkpoint that does not name it")
    images = verbs.add_parser("images", help="write the images of a data set, in the order of its rows")
    images.set_defaults(verb=_images)
    images.add_argument("path", type=Path)
    images.add_argument("--dataset", required=True)
    images.add_argument("--split", choices=("train", "test"), default="test")
    for verb in (run, evaluate, images):
        verb.add_argument("--input", type=_input, action="append", default=[], metavar="REF=PATH")
        verb.add_argument(
            "--cache-max-bytes", type=int, metavar="N", help="larger data sets are decoded as they are needed"
        )
    run.add_argument("--cache", type=Path, help="decoded and downloaded data; default DIR/cache")
    run.add_argument(
        "--teacher-cache-max-bytes", type=int, metavar="N", default=TEACHER_MAX_BYTES, help="for teachers' outputs"
    )
    for verb in (evaluate, images):
        verb.add_argument("--cache", type=Path, default=Path("distillery-data/cache"))
        _add_data_options(verb)

    inspect = verbs.add_parser("inspect", help="print facts of a file or a network")
    inspect.set_defaults(verb=_inspect)
    kinds = inspect.add_subparsers(required=True, dest="kind")
    model, program, logits, dataset = (kinds.add_parser(kind) for kind in ("model", "program", "logits", "dataset"))
    for kind in (model, program, logits, dataset):
        kind.add_argument("path", type=Path)
        kind.add_argument("--progress", action="store_true")
    model.add_argument("--architecture")
    model.add_argument("--channels", type=int)
    _add_data_options(dataset)
    dataset.add_argument("--thumbnails", type=Path, metavar="FILE.png")
    architecture, taps = (kinds.add_parser(kind) for kind in ("architecture", "taps"))
    for kind in (architecture, taps):
        kind.add_argument("name")
        kind.add_argument("--classes", type=int, required=True)
        kind.add_argument("--channels", type=int, required=True)
        kind.add_argument("--image-size", type=int, nargs="+", required=True)
    taps.add_argument("paths", nargs="+", metavar="PATH")
    kinds.add_parser("published").add_argument("name")
    for kind in (model, _add_starts(kinds)):
        kind.add_argument("--part", metavar="NAME", help="the weights to take, of a file with several networks")
        kind.add_argument("--averaged", choices=("true", "false"), help="averaged or raw weights, of a file with both")
    cost = kinds.add_parser("cost")
    cost.add_argument("request")
    return parser


def _add_starts(kinds: Any) -> argparse.ArgumentParser:
    """Add the inspections of what a student can start from. Returns that of a file."""
    start: argparse.ArgumentParser
    start, named_start = (kinds.add_parser(kind) for kind in ("start", "named-start"))
    start.add_argument("path", type=Path)
    start.add_argument("--progress", action="store_true")
    named_start.add_argument("name")
    named_start.add_argument("--from-classes", type=int)
    named_start.add_argument("--from-channels", type=int)
    for kind in (start, named_start):
        kind.add_argument("--architecture", required=True)
        kind.add_argument("--classes", type=int, required=True)
        kind.add_argument("--channels", type=int, required=True)
        kind.add_argument("--freeze", nargs="+", action="extend", default=[], metavar="PATH")
    return start


if __name__ == "__main__":
    sys.exit(main())
