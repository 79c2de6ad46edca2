"""Run every command that the documentation shows, in order, against a real service with small jobs.

    .venv/bin/python -m bench.docs [PAGE ...] [--list]

A page (README.md, docs/*.md) has a fresh folder, a server of its own, and the files that its commands name: small ones,
of random pictures and random weights. Fences of `sh` run as a script, those of `console` command by command, those of
`python` in one interpreter of the page. So what a page does first is there when it goes on. A `console` command that
shows `error:` has to fail in these words, and `cat FILE` writes the lines that it shows.

What cannot run here has a comment before its fence: `<!-- not run: why -->`, or `<!-- not run, ./run test: why -->` for
the commands of it that begin so. Epochs become two, addresses those of the server, and words such as JOB the ids that
they stand for (`WORDS`). Prints what ran, what did not and why; exit status 1 if a command failed. `--list` only lists.
"""

import argparse
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from bench.processes import REPOSITORY, exit_on_sigterm
from bench.service import embedded, open_folder
from client.sdk import Distillery

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")))
LANGUAGES = ("sh", "console", "python")
"""Languages of fences that run. Others, and fences without one, are shown only."""
COMMAND_S = 300
TAIL = 25
ADMIN_KEY = "distillery_" + "5" * 48
"""The operator's key where a page says that the server was started with one."""
WITH_ADMIN_KEY = ("docs/team.md",)
SMALLER = ((r"--epochs \d+", "--epochs 2"), (r'"epochs": ?\d+', '"epochs": 2'))
HOOK = "https://example.org/hooks/distillery"
IMAGES = 18
"""Of each class: with a tenth held out, more than a batch."""
CLASSES = ("daisy", "dandelion", "rose", "sunflower", "tulip")
COUNTS = {"train": 200, "test": 100}
"""The images of cifar100.npz."""
MOBILENET = "torchvision/mobilenet_v3_small"


T = TypeVar("T")


class Failed(Exception):
    """A command failed; the message has its output."""


# ── what a page says ──


@dataclass(frozen=True)
class Command:
    """One command of a page, or a whole script."""

    page: str
    line: int
    language: str
    text: str
    prompt: str = ""
    """The name before a prompt's `$`, whose key is used: `ann$ distillery list`."""
    shown: str = ""
    """The output that the page shows."""
    reason: str | None = None
    """Why it does not run here."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def fails(self) -> bool:
        return self.shown.startswith("error:")


_NOT_RUN = re.compile(r"<!-- not run(?:, (?P<start>[^:]+))?: (?P<reason>.*?) -->", re.DOTALL)
_COMMENTS = re.compile(r"(?:<!--(?:(?!-->).)*-->\s*)+\Z", re.DOTALL)
"""Those that stand before a fence, with no other text between."""
_FENCE = re.compile(r" *```(\w*) *$")
_PROMPT = re.compile(r"(\w*)\$ (.*)")


def commands(page: str, text: str) -> Iterator[Command]:
    """Yield the commands of a page in order. Raises ValueError if a fence is not closed."""
    before: list[str] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            before.append(line)
            continue
        inside = []
        for _, following in lines:
            if following.strip() == "```":
                break
            inside.append(following)
        else:
            raise ValueError(f"{page}:{number}: the fence is not closed")
        comments = _COMMENTS.search("\n".join(before))
        found = _NOT_RUN.finditer(comments[0] if comments else "")
        reasons = {one["start"] or "": " ".join(one["reason"].split()) for one in found}
        before = []
        if fence[1] in LANGUAGES:
            yield from _commands(page, number + 1, fence[1], inside, reasons)


def _commands(
    page: str, line: int, language: str, inside: Sequence[str], reasons: Mapping[str, str]
) -> Iterator[Command]:
    if language != "console":
        yield Command(page, line, language, "\n".join(inside) + "\n", reason=reasons.get(""))
        return
    at = 0
    while at < len(inside):
        prompt = _PROMPT.match(inside[at])
        if prompt is None:
            raise ValueError(f"{page}:{line + at}: a console begins with a prompt, not with {inside[at]!r}")
        first, text = at, [prompt[2]]
        while text[-1].endswith("\\"):
            at += 1
            text.append(inside[at])
        at += 1
        shown = []
        while at < len(inside) and not _PROMPT.match(inside[at]):
            shown.append(inside[at])
            at += 1
        reason = next((why for start, why in reasons.items() if text[0].startswith(start)), None)
        yield Command(page, line + first, language, "\n".join(text), prompt[1], "\n".join(shown), reason)


# ── what its words stand for ──


@dataclass
class Service:
    """The server of a page, and what its commands have printed."""

    url: str
    folder: Path
    hook: str
    key: str | None = None
    """The key that was printed last."""
    keys: dict[str, str] = field(default_factory=dict)
    """The keys that commands made, by name. The operator's, if the server was started with one, has no name."""
    prompt: str = ""
    """Who gives the next command."""

    @contextlib.contextmanager
    def client(self) -> Iterator[Distillery]:
        with Distillery(self.url, api_key=self.keys.get(self.prompt, self.key)) as client:
            yield client

    def newest(self, **filters: str) -> str:
        with self.client() as client:
            return _first(client.jobs(**filters), f"job of {filters}")["id"]  # type: ignore[arg-type]

    def open_upload(self) -> str:
        with self.client() as client:
            headers = {"Upload-Complete": "?0", "Upload-Length": "10"}
            made = client.connection.request("POST", "/v1/uploads", headers=headers, content=b"12345")
            return str(made.headers["location"].rpartition("/")[2])

    def webhook(self) -> str:
        with self.client() as client:
            return _first(client.webhooks(), "webhook")["id"]

    def delivery(self) -> str:
        with self.client() as client:
            return _first(client.deliveries(self.webhook()), "delivery")["id"]

    def note(self, text: str, output: str) -> None:
        """Keep the key that a command has printed."""
        if key := re.search(r"^dk_\w{20,}$", output, re.MULTILINE):
            self.key = key[0]
            if name := re.search(r"keys create (\S+)", text):
                self.keys[name[1]] = key[0]


def _first(rows: Iterable[T], what: str) -> T:
    for row in rows:
        return row
    raise Failed(f"the server has no {what} yet")


WORDS: Mapping[str, Callable[[Service], str]] = {
    "JOB": lambda service: service.newest(kind="distillation", status="succeeded"),
    "TEACHER": lambda service: service.newest(name="teacher"),
    "FIRST": lambda service: service.newest(name="kd"),
    "job_…": lambda service: service.newest(kind="distillation", status="succeeded"),
    "up_…": Service.open_upload,
    "wh_…": Service.webhook,
    "msg_…": Service.delivery,
    "dk_…": lambda service: service.key or "",
    "distillery_…": lambda service: ADMIN_KEY,
    "http://127.0.0.1:8000": lambda service: service.url,
    "https://distill.example.org": lambda service: service.url,
    HOOK: lambda service: service.hook,
    ".venv/bin/python": lambda service: "python",
    "/backups/": lambda service: f"{service.folder}/backups/",
    "/srv/new": lambda service: f"{service.folder}/new",
}
_WORD = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}(?![A-Z_])" for word in sorted(WORDS, key=len, reverse=True)))


def unknown_words(text: str) -> list[str]:
    """Return the words of a command that stand for something that was not named."""
    code = re.sub(r"(^|\s)#.*", "", _WORD.sub("", text))
    return re.findall(r"\S*…\S*", code)


def as_shown(shown: str, output: str) -> bool:
    """Return whether an output is the one that a page shows, where … stands for anything and spaces do not count."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in shown.split("…"))
    return re.fullmatch(pattern, " ".join(output.split()), re.DOTALL) is not None


def small(text: str) -> str:
    """Return a command with few epochs."""
    for pattern, instead in SMALLER:
        text = re.sub(pattern, instead, text)
    return text


def meant(text: str, service: Service) -> str:
    """Return a command with what its words stand for."""
    return _WORD.sub(lambda word: WORDS[word[0]](service), small(text))


# ── running ──


class Interpreter:
    """A process that runs one file after the other and keeps its variables: a shell, or Python."""

    def __init__(self, command: Sequence[str], order: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.order = folder, order
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def run(self, text: str) -> tuple[int, str]:
        """Return exit status and output. A script that exits ends the process."""
        script, output = self.folder / ".snippet", self.folder / ".output"
        script.write_text(text)
        output.write_text("")
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(self.order, file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], COMMAND_S)[0]:
            self.end()
            return 124, output.read_text() + f"\nno end after {COMMAND_S} s"
        answer = self.process.stdout.readline()
        return int(answer or self.process.wait()), output.read_text()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


PYTHON_LOOP = """
import contextlib, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    with open(".output", "w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            exec(compile(open(".snippet").read(), "snippet", "exec"), names)
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
    print(status, flush=True)
"""


class Session:
    """What runs the commands of a page."""

    def __init__(self, service: Service, environment: Mapping[str, str]) -> None:
        self.service, self.environment = service, environment
        self._running: dict[str, Interpreter] = {}

    def run(self, command: Command) -> None:
        """Run a command. Raises Failed."""
        if command.language == "console" and (given := re.fullmatch(r"cat (\S+)", command.text)) and command.shown:
            (self.service.folder / given[1]).write_text(command.shown + "\n")
        self.service.prompt = command.prompt
        text = meant(command.text, self.service)
        if command.language == "sh":
            text = f"set -e\n{text}set +e\n"
        status, output = self._interpreter(command).run(text)
        self.service.note(text, output)
        tail = "\n".join(output.splitlines()[-TAIL:])
        if command.fails != (status != 0):
            expected = "an error" if command.fails else "success"
            raise Failed(f"exit status {status}, not {expected}, of\n{text.rstrip()}\n{tail}")
        if command.fails and not as_shown(command.shown, output):
            raise Failed(f"the error is not the one that is shown:\n{tail}")

    def _interpreter(self, command: Command) -> Interpreter:
        name = "python" if command.language == "python" else f"{command.prompt}$"
        if name in self._running and not self._running[name].alive:
            self._running.pop(name).end()
        if name not in self._running:
            environment = dict(self.environment)
            if command.prompt and (key := self.service.keys.get(command.prompt)):
                environment["DISTILLERY_API_KEY"] = key
            run: tuple[Sequence[str], str]
            if command.language == "python":
                run = [sys.executable, "-c", PYTHON_LOOP], "next"
            else:
                run = ["bash", "--norc", "--noprofile", "-o", "pipefail"], ". ./.snippet > .output 2>&1; echo $?"
            self._running[name] = Interpreter(*run, self.service.folder, environment)
        return self._running[name]

    def end(self) -> None:
        for interpreter in self._running.values():
            interpreter.end()


def run_page(page: str, of_page: Sequence[Command], folder: Path) -> tuple[int, int, int]:
    """Run a page's commands, and print each. Return how many ran, did not run here, and failed."""
    ran = left_out = failed = 0
    with contextlib.ExitStack() as running:
        session = None
        if any(command.reason is None for command in of_page):
            session = running.enter_context(_session(page, folder))
        for command in of_page:
            title = f"{command.place:26} {command.text.splitlines()[0][:80]}"
            if command.reason is not None or session is None:
                left_out += 1
                print(f"not run  {title}\n         {command.reason}", flush=True)
                continue
            began = time.monotonic()
            try:
                session.run(command)
            except Failed as error:
                failed += 1
                print(f"FAILED   {title}\n{error}\n", flush=True)
            else:
                ran += 1
                print(f"ok       {title}  ({time.monotonic() - began:.1f} s)", flush=True)
    return ran, left_out, failed


@contextlib.contextmanager
def _session(page: str, folder: Path) -> Iterator[Session]:
    open_folder(folder)
    work = folder / "work"
    make_inputs(work)
    make_programs(work)
    settings = {"OMP_NUM_THREADS": "1", "DISTILLERY_WEBHOOK_ALLOW": "127.0.0.1"}
    if page in WITH_ADMIN_KEY:
        settings["DISTILLERY_ADMIN_KEY_HASH"] = hashlib.sha256(ADMIN_KEY.encode()).hexdigest()
    with embedded(folder, **settings) as url, receiver() as hook:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DISTILLERY_")}
        environment = {
            **inherited,
            **{"PATH": f"{work / 'bin'}:{Path(sys.executable).parent}:{inherited.get('PATH', os.defpath)}"},
            **{"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            **{"DISTILLERY_URL": url, "DISTILLERY_HOME": str(folder / "home")},
        }
        service = Service(url, work, hook, keys={"": ADMIN_KEY} if page in WITH_ADMIN_KEY else {})
        session = Session(service, environment)
        try:
            yield session
        finally:
            session.end()


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def receiver() -> Iterator[str]:
    """Run a server that takes the messages of webhooks. Yields its URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hooks/distillery"
        server.shutdown()


# ── what its commands find in the folder ──


def make_programs(folder: Path) -> None:
    """Write the commands that a checkout, an installed package and a container have; `curl` fails with the server."""
    programs = {
        "run": 'case $1 in up) echo "the server of this page runs already";; demo) exec distillery "$@";; '
        'distillery) shift; exec distillery "$@";; *) echo "no ./run $1 here"; exit 2;; esac',
        "bin/distillery": 'exec python -c "import sys; from client.cli import main; sys.exit(main())" "$@"',
        "bin/curl": f'exec {shutil.which("curl")} --fail-with-body "$@"',
    }
    (folder / "bin").mkdir()
    for name, text in programs.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


def make_inputs(folder: Path) -> None:
    """Write the files that pages name: small, of random pictures and random weights."""
    import torch
    from safetensors.torch import save_file

    from kdcore import models

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    folder.mkdir()
    photographs = {
        f"{split}/{name}/{number}.jpg": _jpeg(rng)
        for split, count in (("train", IMAGES), ("test", 4))
        for name in CLASSES
        for number in range(count)
    }
    for name in ("flowers.zip", "flowers128.zip", "my-pictures.zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path, content in photographs.items():
                archive.writestr(path, content)
    for path, content in photographs.items():
        (folder / "flowers" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "flowers" / path).write_bytes(content)
    for name in ("cat.jpg", "rose.jpg"):
        (folder / name).write_bytes(_jpeg(rng))
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for number in range(80):
            archive.writestr(f"{number}.jpg", _jpeg(rng, 32, 32))
    pictures = {f"x_{split}": rng.integers(0, 256, (count, 32, 32, 3), "uint8") for split, count in COUNTS.items()}
    labels = {f"y_{split}": np.arange(count) % 100 for split, count in COUNTS.items()}
    np.savez(folder / "cifar100.npz", **pictures, **labels)
    np.savez(folder / "teacher.npz", logits=rng.normal(size=(IMAGES * len(CLASSES), len(CLASSES))).astype("float32"))
    resnet56 = models.build("resnet56", 100, 3).state_dict()
    for name in ("resnet56.pth", "cifar100_resnet56.pth"):
        torch.save(resnet56, folder / name)
    torch.save(models.build("torchvision/resnet18", len(CLASSES), 3).state_dict(), folder / "teacher.pth")
    facts = {"architecture": MOBILENET, "num_classes": 100, "channels": 3, "image_size": [32, 32], "members": 1}
    facts |= {"class_names": [f"class {number}" for number in range(100)], "mean": [0.5] * 3, "std": [0.25] * 3}
    weights = models.build(MOBILENET, 100, 3).state_dict()
    save_file(weights, folder / "mobilenet.safetensors", {"distillery": json.dumps(facts)})
    _write_onnx(folder / "teacher.onnx", rng.normal(size=(3, len(CLASSES))).astype("float32"))
    documents: dict[str, object] = {
        "map.json": {name: number for number, name in enumerate(CLASSES)},
        "job.json": {
            **{"dataset": "flowers", "student": "convnet4", "method": "kd"},
            "training": {"epochs": 2, "augmentation": "none"},
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))


def _jpeg(rng: np.random.Generator, height: int = 64, width: int = 80) -> bytes:
    content = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), "uint8")).save(content, "JPEG")
    return content.getvalue()


def _write_onnx(path: Path, weights: np.ndarray) -> None:
    """Write a network that looks at the mean colour of an image."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weights.shape[1]])
    graph = helper.make_graph(nodes, "teacher", [images], [logits], [numpy_helper.from_array(weights, "weights")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def read_pages(names: Sequence[str], repository: Path = REPOSITORY) -> dict[str, list[Command]]:
    """Return the commands of pages. Raises ValueError where one says nothing that can be run and has no reason."""
    pages = {name: list(commands(name, (repository / name).read_text())) for name in names}
    run = (one for of_page in pages.values() for one in of_page if one.reason is None and one.language != "python")
    for command in run:
        if unknown := unknown_words(command.text):
            raise ValueError(f"{command.place}: it is not known what {', '.join(unknown)} stands for")
    return pages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.docs", description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", metavar="PAGE", default=PAGES)
    parser.add_argument("--list", action="store_true", help="run nothing: print the commands")
    arguments = parser.parse_args()
    exit_on_sigterm()
    unknown = sorted(set(arguments.pages) - set(PAGES))
    if unknown:
        parser.error(f"there is no page {', '.join(unknown)}; allowed: {', '.join(PAGES)}")
    pages = read_pages(arguments.pages)
    if arguments.list:
        for command in (one for of_page in pages.values() for one in of_page):
            print(f"{command.place:26} {command.reason or 'runs'}\n    {command.text.splitlines()[0]}")
        return 0
    totals = [0, 0, 0]
    for page, of_page in pages.items():
        if of_page:
            with tempfile.TemporaryDirectory(prefix="distillery-docs-") as name:
                totals = [sum(pair) for pair in zip(totals, run_page(page, of_page, Path(name)), strict=True)]
    print(f"{totals[0]} commands ran, {totals[1]} cannot run here, {totals[2]} failed")
    return 1 if totals[2] else 0


if __name__ == "__main__":
    sys.exit(main())
