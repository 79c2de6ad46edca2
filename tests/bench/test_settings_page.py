"""docs/settings.md says what the classes of the settings say."""

from bench import settings_page
from store.settings import Settings
from worker.context import Options


def test_the_page_is_what_the_classes_say():
    assert settings_page.PAGE.read_text() == settings_page.page(), "run `python -m bench.settings_page`"


def test_the_page_has_every_setting_with_its_type_and_default():
    page = settings_page.page()
    for kind in (Settings, Options):
        for name in kind.model_fields:
            assert f"| `DISTILLERY_{name.upper()}` |" in page
    assert "| `DISTILLERY_PORT` | integer ≥ 0, ≤ 65535 | `8000` |" in page
    assert "| `DISTILLERY_LOG_FORMAT` | `text` or `json` | `text` |" in page
    assert "| `DISTILLERY_OTEL` | true or false | `false` |" in page
