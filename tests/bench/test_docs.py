"""The checker of the documentation's commands: what it reads, what its words stand for, and what it reports."""

import re
from pathlib import Path

import pytest

from bench.docs import (
    LANGUAGES,
    PAGES,
    WORDS,
    Command,
    Interpreter,
    Service,
    Session,
    as_shown,
    commands,
    meant,
    read_pages,
    run_page,
    small,
    unknown_words,
)
from bench.processes import REPOSITORY

PAGE = """# A page

<!-- not run, ./run test: it takes
 minutes -->
```console
$ ./run demo     # half a minute
$ ./run test
ann$ distillery submit \\
    --watch
{"answer": 1}
```

<!-- not run: it needs Docker -->

```sh
docker compose up
```

Text in between, <!-- not run: of nothing --> and more of it.

```python
print(1)
```

```json
{"shown": "only"}
```
"""


def test_commands_have_prompt_shown_output_and_reason() -> None:
    assert list(commands("page.md", PAGE)) == [
        Command("page.md", 6, "console", "./run demo     # half a minute"),
        Command("page.md", 7, "console", "./run test", reason="it takes minutes"),
        Command("page.md", 8, "console", "distillery submit \\\n    --watch", "ann", '{"answer": 1}'),
        Command("page.md", 16, "sh", "docker compose up\n", reason="it needs Docker"),
        Command("page.md", 22, "python", "print(1)\n"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("```sh\nls\n", "page.md:1: the fence is not closed"), ("```console\nls\n```\n", "page.md:2: a console begins")],
)
def test_commands_refuse_what_cannot_be_read(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        list(commands("page.md", text))


def test_every_command_of_the_documentation_runs_or_has_a_reason() -> None:
    pages = read_pages(PAGES)
    found = [command for of_page in pages.values() for command in of_page]
    assert len(found) > 50 and all(command.reason is None or len(command.reason) > 5 for command in found)
    # No comment has lost its fence, and no command stands in a fence that is only shown.
    for page in PAGES:
        text = (REPOSITORY / page).read_text()
        reasons = len(re.findall(r"^<!-- not run", text, re.MULTILINE))
        assert len({(one.reason, one.line) for one in pages[page] if one.reason}) >= reasons, page
        for language, inside in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            shown_only = language not in LANGUAGES
            assert not (shown_only and re.search(r"^\w*\$ (distillery|\./run|docker) ", inside, re.MULTILINE)), page


def test_read_pages_refuses_a_word_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```console\n$ distillery show wj_…   # any …\n```\n")
    with pytest.raises(ValueError, match="it is not known what wj_… stands for"):
        read_pages(["page.md"], tmp_path)


def test_words_are_replaced_and_epochs_made_few() -> None:
    service = Service("http://127.0.0.1:9", Path("/srv"), "http://127.0.0.1:8/hooks", key="dk_1")
    text = "curl http://127.0.0.1:8000/v1 -H 'Bearer dk_…' --epochs 30 > /backups/x # EXPORT_JOB is no word"
    assert meant(text, service) == (
        "curl http://127.0.0.1:9/v1 -H 'Bearer dk_1' --epochs 2 > /srv/backups/x # EXPORT_JOB is no word"
    )
    assert small('{"epochs": 240, "teacher_epochs": 3}') == '{"epochs": 2, "teacher_epochs": 3}'
    assert unknown_words("distillery show job_… wh_…") == []
    assert not any("…" in word and not word.endswith("_…") for word in WORDS)


def test_note_keeps_the_key_that_a_command_printed() -> None:
    service = Service("", Path(), "")
    service.note("distillery keys create ann --role admin", "shown only now:\ndk_" + "a" * 40 + "\n")
    assert service.keys == {"ann": "dk_" + "a" * 40} and service.key == service.keys["ann"]


def test_as_shown_takes_an_ellipsis_for_anything() -> None:
    assert as_shown("error: it cannot work\n  /x: 1 (allowed: …)", "error: it  cannot work\n/x: 1 (allowed: 2, 3)\n")
    assert not as_shown("error: it cannot work", "error: it cannot work\n/x: another fault")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(Service("", tmp_path, ""), {"PATH": "/usr/bin:/bin"})


def test_session_keeps_variables_and_says_what_failed(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = """```console
$ cat words.txt
one two
$ name=$(cat words.txt)
$ test "$name" = "one two" && echo "error: as shown"; false
error: as shown
$ false | true
```
```sh
test "$name" = "one two"
false
true
```
```python
import os
number = 2
```
```python
print(number + 1, os.getcwd())
raise KeyError(number)
```
"""
    monkeypatch.setattr("bench.docs._session", lambda *_: _Given(session))
    assert run_page("page.md", list(commands("page.md", page)), tmp_path) == (4, 0, 3)
    printed = capsys.readouterr().out
    assert "FAILED   page.md:7 " in printed and "exit status 1, not success, of\nfalse | true" in printed
    assert "FAILED   page.md:10 " in printed
    assert f"3 {tmp_path}" in printed and "KeyError: 2" in printed


def test_interpreter_ends_what_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.docs.COMMAND_S", 0.05)
    interpreter = Interpreter(["sleep", "100"], "next", tmp_path, {"PATH": "/usr/bin:/bin"})
    assert interpreter.run("never read") == (124, "\nno end after 0.05 s")
    assert not interpreter.alive


class _Given:
    def __init__(self, session: Session) -> None:
        self.session = session

    def __enter__(self) -> Session:
        return self.session

    def __exit__(self, *_: object) -> None:
        self.session.end()
