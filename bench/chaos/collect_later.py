"""`python -m bench.chaos.collect_later`: the store's collector, with the clock one month ahead.

A file that it does not remove would stay for ever.
"""

import sys

from store.collector import Collector, Retention
from store.database import Database
from store.file_store import FileStore
from store.settings import Settings

MONTH_S = 30 * 86_400
RUNS = 2
"""The first run moves files to the trash, the second one deletes them."""


class Later(FileStore):
    def now(self) -> float:
        return super().now() + MONTH_S


def main() -> None:
    settings = Settings()
    # The clock of the rows is unchanged: checkpoints that a failed or cancelled job can continue from are kept.
    retention = Retention(
        after_s=0, checkpoints_s=MONTH_S, uploads_s=MONTH_S, open_uploads_s=MONTH_S, inspections_s=MONTH_S
    )
    for _ in range(RUNS):
        collector = Collector(Database(settings.database_url), Later(settings.files), retention)
        collector.run()
        if collector.faults:
            sys.exit("\n".join(collector.faults))


if __name__ == "__main__":
    main()
