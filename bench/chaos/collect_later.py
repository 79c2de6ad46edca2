"""A collection of the service, a month from now: what it leaves of a storm's leavings then is left for ever.

python -m bench.chaos.collect_later
"""

import sys

from store.blobs import BlobStore
from store.collector import Collector, Retention
from store.database import Database
from store.settings import Settings

MONTH_S = 30 * 86_400
TIMES = 2
"""What one moves to the trash, the next one removes."""


class Later(BlobStore):
    def now(self) -> float:
        return super().now() + MONTH_S


def main() -> None:
    settings = Settings()
    # Rows keep their ages: what a failed or cancelled job may go on from is still wanted.
    retention = Retention(after_s=0, checkpoints_s=MONTH_S, uploads_s=MONTH_S)
    for _ in range(TIMES):
        collector = Collector(Database(settings.database_url), Later(settings.files), retention)
        collector.run()
        if collector.faults:
            sys.exit("\n".join(collector.faults))


if __name__ == "__main__":
    main()
