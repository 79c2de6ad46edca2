"""`python -m bench.chaos`: no job is lost, duplicated or half done, whatever is killed meanwhile.

    python -m bench.chaos --setting cluster --jobs 200 --kills 200 --seed 1 [--json FILE]
    python -m bench.chaos --setting embedded --jobs 60 --kills 60 --seed 1

Real trainings by the real engine on real servers. Processes are killed, frozen and cut off, and the disk is filled, by
a schedule drawn from the seed; then the results are checked from outside. Exit code 1 if a check fails; the logs are
then kept.
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

from bench.chaos.checks import violations
from bench.chaos.report import as_json, as_text, figures
from bench.chaos.run import RunOptions, Stalled, run


def main() -> int:
    arguments = _parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    options = RunOptions(
        arguments.setting,
        arguments.jobs,
        arguments.kills,
        arguments.seed,
        arguments.workers,
        misbehaving=arguments.misbehaving,
    )
    root = Path(tempfile.mkdtemp(prefix="distillery-chaos-"))
    began = time.monotonic()
    failed = True
    try:
        results = run(options, root, lambda text: print(text, flush=True))
        violated = violations(results)
        counts = figures(results, violated)
        wall_s = time.monotonic() - began
        print(as_text(counts, violated, options.setting, options.seed, wall_s))
        if arguments.json:
            document = {"options": vars(options), "wall_s": round(wall_s, 1), **as_json(results, violated, counts)}
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        failed = bool(violated)
    except Stalled as error:
        print(f"chaos: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        failed = False
        return 128 + signal.SIGINT
    finally:
        if failed:
            print(f"logs and step records are in {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt the run once: further signals must not interrupt the stop of servers and programs."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=("cluster", "embedded"), required=True)
    parser.add_argument("--jobs", type=int, default=200, help="minimum number of jobs; default 200")
    parser.add_argument("--kills", type=int, default=200, help="number of SIGKILLs; default 200")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3, help="processes that train; default 3")
    parser.add_argument("--misbehaving", action="store_true", help="also clients that are slow, cut off and hostile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, violations and their rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
