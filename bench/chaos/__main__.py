"""`python -m bench.chaos`: no job lost, doubled or half done, whatever is killed meanwhile.

    python -m bench.chaos --setting cluster --jobs 200 --kills 200 --seed 1 [--json FILE]
    python -m bench.chaos --setting embedded --jobs 60 --kills 60 --seed 1

Real trainings by the real engine on real servers; everything is killed, frozen, cut off and filled up by a schedule
drawn from the seed, and then looked at from outside. Exit code 1 where anything is not as promised; the logs stay then.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from bench.chaos import report
from bench.chaos.checks import violations
from bench.chaos.run import Stalled, Terms, run


def main() -> int:
    given = _parser().parse_args()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _stop)
    terms = Terms(given.setting, given.jobs, given.kills, given.seed, given.workers)
    root = Path(tempfile.mkdtemp(prefix="distillery-chaos-"))
    began = time.monotonic()
    kept = True
    try:
        seen = run(terms, root, lambda text: print(text, flush=True))
        found = violations(seen)
        counted = report.figures(seen, found)
        wall_s = time.monotonic() - began
        print(report.printed(counted, found, terms.setting, terms.seed, wall_s))
        if given.json:
            told = {"terms": vars(terms), "wall_s": round(wall_s, 1), **report.as_json(seen, found, counted)}
            given.json.write_text(json.dumps(told, indent=1) + "\n")
        kept = bool(found)
    except Stalled as error:
        print(f"chaos: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        kept = False
        return 128 + signal.SIGINT
    finally:
        if kept:
            print(f"logs and step records are in {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)
    return 1 if kept else 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Only the first time: what follows stops servers and programs, and is not to be interrupted."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=("cluster", "embedded"), required=True)
    parser.add_argument("--jobs", type=int, default=200, help="at least so many; default 200")
    parser.add_argument("--kills", type=int, default=200, help="by SIGKILL; default 200")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3, help="processes that train; default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures, faults, and all rows of what went wrong")
    return parser


if __name__ == "__main__":
    sys.exit(main())
