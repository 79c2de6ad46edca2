"""Random requests made from the OpenAPI document (schemathesis), against a server of its own on each database.

    python -m bench.fuzz                          both databases, blind and with real ids, 50 requests an operation
    python -m bench.fuzz --database sqlite --examples 500 --seed 7

Every answer is compared with the document: its status, type, headers, schema. A 500 is a finding. The server has rows
of every kind: a succeeded job with files, a queued one, a model, a data set, an open upload. No worker runs, so that
the jobs which the requests submit compute nothing. Ends with 1 if there is a finding.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.processes import START_S, Program, exit_on_sigterm, wait_until
from bench.service import open_folder, run_command
from client.sdk import Distillery
from local import servers

PHASES = "examples,coverage,fuzzing,stateful"
JOB = {"dataset": "digits", "student": "convnet8", "method": "supervised", "training": {"epochs": 1}}
DESTRUCTIVE = ("delete", "post", "patch")
"""With real ids, only reads and these actions are tried: a deleted row answers nothing more."""
REPEATABLE = (
    *("/v1/jobs/{job_id}/pause", "/v1/jobs/{job_id}/resume", "/v1/models/{name_or_id}/evaluations"),
    *("/v1/webhooks/{webhook_id}/test", "/v1/webhooks/{webhook_id}/rotate"),
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay",
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    exit_on_sigterm()
    findings = 0
    for database in arguments.database:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name, _served(database, Path(name)) as (url, ids):
            # The blind run is the last: it finds rows in lists, and deletes them.
            for what, parameters in (("with real ids", ids), ("blind", {})):
                print(f"── {database}, {what}", flush=True)
                findings += _fuzz(url, parameters, Path(name), arguments)
    print(f"{findings} of the runs found something" if findings else "no findings")
    return 1 if findings else 0


@contextlib.contextmanager
def _served(database: str, folder: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Serve an API with rows of every kind. Yields its URL and the ids of the rows, by parameter."""
    open_folder(folder)
    with contextlib.ExitStack() as running:
        home = folder / "home"
        url = f"sqlite:///{home / 'distillery.db'}"
        if database == "postgres":
            url = running.enter_context(servers.postgres(folder / "postgres"))
        port = servers.free_port()
        settings = {"DISTILLERY_HOME": str(home), "DISTILLERY_DATABASE_URL": url, "DISTILLERY_PORT": str(port)}
        ready = folder / "ready.json"
        embedded = Program("serve", ["serve", "--ready-file", str(ready)], folder / "serve.log", settings)
        try:
            ids = _rows(embedded.wait_for_url(ready), folder)
        finally:
            embedded.stop()
        run_command("store", "migrate", settings=settings)
        api = Program("api", ["api"], folder / "api.log", settings)
        running.callback(api.stop)
        address = f"http://127.0.0.1:{port}"
        with Distillery(address, retries=20) as service:
            wait_until(service.ready, "the server to answer", START_S)
            ids["queued"] = service.submit(JOB)["id"]
        yield address, ids
        log = (folder / "api.log").read_text(errors="replace")
        print(f"{log.count('Traceback')} tracebacks in the server's log", flush=True)


def _rows(url: str, folder: Path) -> dict[str, str]:
    """Make a row of each kind. Returns their ids."""
    with Distillery(url) as service:
        job = service.wait(service.submit(JOB)["id"])
        assert job["status"] == "succeeded", job["error"]
        weights = folder / "student.safetensors"
        service.download(job["id"], to=weights)
        model = service.register_model("fuzzed-model", weights)
        generator = np.random.default_rng(0)
        pixels, labels = generator.integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40) % 4
        np.savez(folder / "data.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
        dataset = service.register_dataset("fuzzed-data", folder / "data.npz")
        upload = httpx.post(f"{url}/v1/uploads", headers={"Upload-Length": "1000000"}).json()["id"]
        webhook = service.add_webhook("https://hooks.invalid/")["id"]
        delivery = service.test_webhook(webhook)["id"]
    rows = {"job_id": job["id"], "model": model["id"], "dataset": str(dataset["id"]), "upload_id": upload}
    return {**rows, "webhook_id": webhook, "delivery_id": delivery}


def _fuzz(url: str, ids: Mapping[str, str], folder: Path, arguments: argparse.Namespace) -> int:
    """Run schemathesis once. Returns 1 if it found something."""
    document = httpx.get(f"{url}/openapi.json").json()
    described = folder / "openapi.json"
    described.write_text(json.dumps(_readable(document)))
    configuration = folder / "schemathesis.toml"
    configuration.write_text("\n".join(_configuration(document, ids)))
    command = [
        str(Path(sys.executable).with_name("st")), "--config-file", str(configuration), "run", str(described),
        "--url", url, "--phases", arguments.phases, "--max-examples", str(arguments.examples),
        "--seed", str(arguments.seed), "--continue-on-failure", "--request-timeout", "60",
        "--suppress-health-check", "all", "--warnings", "off", "--generation-database", "none",
    ]  # fmt: skip
    if ids:
        command += [f"--exclude-name={name}" for name in _destructive(document)]
    done = subprocess.run(command, cwd=folder, check=False)
    return int(done.returncode != 0)


def _readable(node: Any) -> Any:
    """Return a document without `prefixItems`, which schemathesis 4.32 reads wrongly in answers: it makes the list that
    Draft 4 had in `items`, and then finds that this is no schema."""
    if isinstance(node, list):
        return [_readable(part) for part in node]
    if not isinstance(node, dict):
        return node
    read = {key: _readable(part) for key, part in node.items()}
    if "prefixItems" in read:
        read["items"] = {"anyOf": read.pop("prefixItems")}
    return read


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, methods in document["paths"].items():
        yield from ((method, path) for method in methods if method in ("get", "head", "post", "patch", "put", "delete"))


def _destructive(document: Mapping[str, Any]) -> list[str]:
    """Return the names of the operations that change or delete the row that they name."""
    return [
        f"{method.upper()} {path}"
        for method, path in _operations(document)
        if "{" in path and method in DESTRUCTIVE and path not in REPEATABLE
    ]


def _configuration(document: Mapping[str, Any], ids: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of schemathesis' configuration: the row that each operation names."""
    # JSON schema cannot say that a spec works, that names exist, or how large the server's limits are.
    yield "[checks.positive_data_acceptance]"
    yield 'expected-statuses = ["2xx", "3xx", 400, 401, 403, 404, 409, 413, 422, 429, "5xx"]'
    yield "[[operations]]"
    yield 'include-name = "POST /v1/jobs/validate"'
    yield "checks.negative_data_rejection.enabled = false  # its answer has the faults"
    yield "[[operations]]"
    yield 'include-name = "POST /v1/uploads"'
    yield "checks.negative_data_rejection.enabled = false  # it takes any headers beside its own, as HTTP does"
    yield "[[operations]]"
    yield 'include-name = "GET /v1/jobs/{job_id}/events/stream"'
    yield "max-stream-events = 3  # the stream of a job that has not ended stays open"
    yield "request-timeout = 3"
    own = {name: ids.get(name) for name in ("job_id", "upload_id", "webhook_id", "delivery_id")}
    for method, path in _operations(document) if ids else ():
        values = {name: value for name, value in own.items() if value and f"{{{name}}}" in path}
        if path in REPEATABLE and "job_id" in values:
            values["job_id"] = ids["queued"]
        if "{name_or_id}" in path:
            values["name_or_id"] = ids["model" if path.startswith("/v1/models") else "dataset"]
        if path.endswith("/artifacts/{name}"):
            values["name"] = "student.safetensors"
        if path.startswith("/v1/methods"):
            values["name"] = "kd"
        if values:
            yield "[[operations]]"
            yield f'include-name = "{method.upper()} {path}"'
            yield "[operations.parameters]"
            yield from (f'"path.{name}" = "{value}"' for name, value in values.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--database", nargs="+", choices=("sqlite", "postgres"), default=["sqlite", "postgres"])
    parser.add_argument("--examples", type=int, default=50, help="requests of an operation in a phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phases", default=PHASES)
    return parser


if __name__ == "__main__":
    sys.exit(main())
