"""A large upload that is cut three times arrives whole, and the server needs no memory for it.

    python -m bench.big_upload [--bytes 5000000000] [--cuts 3] [--json FILE]

Starts an embedded server, begins an upload of that many bytes with their SHA-256, and sends them. The connection is cut
by RST in the middle of a part, so many times, at places drawn evenly; after each cut the client asks for the offset and
goes on there. At the end the blob on the server's disk is hashed once more. Prints the offsets, the speed and the peak
of the server's resident memory before and after; exit code 1 if the bytes differ. Needs twice the bytes of free disk
space for a moment, and no file on the client's side: the bytes are made while they are sent.
"""

import argparse
import hashlib
import http.client
import json
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.processes import exit_on_sigterm
from bench.service import embedded

BLOCK_BYTES = 1 << 20
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close by RST, as a client that has lost its power."""
UNFINISHED = 409


@dataclass(frozen=True)
class Uploaded:
    bytes: int
    cuts: int
    resumed_at: list[int]
    """The offset that the server reported after each cut."""
    seconds: float
    whole: bool
    peak_before_bytes: int
    peak_bytes: int

    def line(self) -> str:
        at = ", ".join(f"{offset / 1e6:,.1f}" for offset in self.resumed_at)
        return (
            f"{self.bytes / 1e9:g} GB, cut {self.cuts} times, resumed at {at} MB: "
            f"{'whole' if self.whole else 'DAMAGED'}, {self.bytes / 1e6 / self.seconds:.0f} MB/s; the server's peak "
            f"memory {self.peak_before_bytes / 1e6:.0f} MB before and {self.peak_bytes / 1e6:.0f} MB after"
        )


def content(begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes from `begin` to `end` of a file that is the same each time and repeats no block."""
    filler = hashlib.shake_256(b"big upload").digest(BLOCK_BYTES - 8)
    for number in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
        block, first = number.to_bytes(8, "big") + filler, number * BLOCK_BYTES
        yield block[max(0, begin - first) : end - first]


def upload(url: str, size: int, cuts: int) -> tuple[str, list[int]]:
    """Upload so many bytes with so many cuts. Returns the blob's digest and the offsets after the cuts."""
    digest = hashlib.sha256()
    for piece in content(0, size):
        digest.update(piece)
    address = urlsplit(url).netloc
    begun = _request(address, "POST", f"/v1/uploads?sha256={digest.hexdigest()}", {"Upload-Length": str(size)})
    path, offset, resumed = f"/v1/uploads/{begun['id']}", 0, []
    for cut in range(1, cuts + 1):
        _send_and_cut(address, path, offset, size, until=size * cut // (cuts + 1))
        offset = _settled(address, path)
        resumed.append(offset)
    answer = _patch(address, path, offset, size)
    blob: str | None = answer["blob"]
    assert blob is not None and blob == f"sha256:{digest.hexdigest()}", answer
    return digest.hexdigest(), resumed


def _send_and_cut(address: str, path: str, offset: int, size: int, until: int) -> None:
    connection = _begin_patch(address, path, offset, size)
    for piece in content(offset, until):
        connection.send(piece)
    assert connection.sock is not None
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def _settled(address: str, path: str) -> int:
    """Return the upload's offset when the server has noticed the cut: until then another part is refused."""
    while True:
        offset = int(_request(address, "GET", path)["offset"])
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("PATCH", path, b"", {"Upload-Offset": str(offset)})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status != UNFINISHED:
            return offset
        time.sleep(0.05)


def _patch(address: str, path: str, offset: int, size: int) -> dict[str, str]:
    connection = _begin_patch(address, path, offset, size)
    for piece in content(offset, size):
        connection.send(piece)
    answer = connection.getresponse()
    found: dict[str, str] = json.load(answer)
    connection.close()
    assert answer.status == http.client.OK, found
    return found


def _begin_patch(address: str, path: str, offset: int, size: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.putrequest("PATCH", path)
    connection.putheader("Upload-Offset", str(offset))
    connection.putheader("Content-Length", str(size - offset))
    connection.endheaders()
    return connection


def _request(address: str, method: str, path: str, headers: dict[str, str] | None = None) -> dict[str, str]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    found: dict[str, str] = json.load(answer)
    assert answer.status < http.client.BAD_REQUEST, found
    connection.close()
    return found


def peak_bytes(pid: int) -> int:
    """Return the largest resident memory that a process has had."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(url: str, pid: int, files: Path, size: int, cuts: int) -> Uploaded:
    """Upload to a server with that process id and folder of files."""
    before, began = peak_bytes(pid), time.monotonic()
    digest, resumed = upload(url, size, cuts)
    seconds = time.monotonic() - began
    with (files / "blobs" / digest[:2] / digest).open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest() == digest
    return Uploaded(size, cuts, resumed, seconds, whole, before, peak_bytes(pid))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.big_upload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=5_000_000_000)
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="distillery-upload-") as name:
        folder = Path(name)
        with embedded(folder, DISTILLERY_WARM="false") as url:
            pid = json.loads((folder / "ready.json").read_text())["pid"]
            found = measure(url, pid, folder / "home" / "files", options.bytes, options.cuts)
    print(found.line())
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    return 0 if found.whole else 1


if __name__ == "__main__":
    sys.exit(main())
