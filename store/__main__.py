"""`python -m store migrate`: bring the database of the settings to the newest revision."""

import argparse

from sqlalchemy import make_url

from store.database import migrate
from store.settings import settings_or_exit


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m store", description=__doc__)
    parser.add_subparsers(required=True, metavar="COMMAND").add_parser("migrate", help="make or upgrade the tables")
    parser.parse_args()
    (settings,) = settings_or_exit("store")
    url = settings.database_url
    migrate(url)
    print(f"{make_url(url).render_as_string(hide_password=True)} is up to date")


if __name__ == "__main__":
    main()
