"""Commands for the service: its catalogue and state, keys, projects, limits, webhooks, audit log."""

import hashlib
import secrets
from itertools import islice
from typing import Annotated, Literal, get_args

import typer

from base.jobs import WebhookEvent
from base.wire import (
    NewKeyView,
    Role,
    SecretWebhookView,
)
from client import tables
from client.commands.common import (
    AsJson,
    Commands,
)
from client.errors import InvalidInput
from client.spec import (
    parse_duration,
)
from client.terminal import (
    output,
    print_json,
    print_lines,
    print_list,
    tell,
)

app = typer.Typer(cls=Commands)
keys_app = typer.Typer(cls=Commands, no_args_is_help=True, help="API keys: create, list, rotate, revoke.")
projects_app = typer.Typer(cls=Commands, invoke_without_command=True, help="Projects: list, create, delete.")
app.add_typer(keys_app, name="keys")
webhooks_app = typer.Typer(
    cls=Commands, invoke_without_command=True, help="Webhooks: list, add, change, test, deliveries, replay, remove."
)
app.add_typer(webhooks_app, name="webhooks")
app.add_typer(projects_app, name="projects")
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id.")]
WebhookEvents = Annotated[
    list[str] | None,
    typer.Option(
        "--event", help=f"An event to notify it of; repeat it for several: {', '.join(get_args(WebhookEvent))}."
    ),
]


@webhooks_app.callback()
def list_webhooks(context: typer.Context, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        webhooks = list(context.obj.webhooks())
        print_list(webhooks, as_json, tables.webhook_table, "no webhooks yet: distillery webhooks add URL")
        for webhook in webhooks:
            if webhook["note"] is not None:
                tell(f"{webhook['id']}: {webhook['note']}")


@webhooks_app.command("add")
def add_webhook(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="https://host/path")],
    events: WebhookEvents = None,
) -> None:
    """Notify an address of the project's jobs: by default of their ends and alerts. Its secret is printed once."""
    webhook = context.obj.add_webhook(url, events)
    output().print(tables.webhook_table([webhook]))
    _print_secret(webhook)


@webhooks_app.command("change")
def change_webhook(
    context: typer.Context,
    webhook_id: WebhookId,
    url: Annotated[str | None, typer.Option(help="https://host/path")] = None,
    events: WebhookEvents = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Begin to send again, or send nothing more.")
    ] = None,
) -> None:
    """Change the URL or the events of a webhook, disable it, or enable it again."""
    output().print(
        tables.webhook_table([context.obj.change_webhook(webhook_id, url=url, events=events, enabled=enabled)])
    )


@webhooks_app.command("rotate")
def rotate_webhook(context: typer.Context, webhook_id: WebhookId) -> None:
    """Give a webhook another secret. For a day messages are signed with the earlier one, too."""
    _print_secret(context.obj.rotate_webhook(webhook_id))


@webhooks_app.command("test")
def test_webhook(context: typer.Context, webhook_id: WebhookId) -> None:
    """Send a test message."""
    delivery = context.obj.test_webhook(webhook_id)
    typer.echo(f"{delivery['id']} will be sent; what comes of it: distillery webhooks deliveries {webhook_id}")


@webhooks_app.command("deliveries")
def list_deliveries(
    context: typer.Context,
    webhook_id: WebhookId,
    status: Annotated[Literal["pending", "delivered", "failed"] | None, typer.Option(help="Default: all.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the messages to a webhook, newest first, with the last answer."""
    deliveries = list(islice(context.obj.deliveries(webhook_id, status=status), limit))
    print_list(deliveries, as_json, tables.delivery_table, "nothing was sent yet")


@webhooks_app.command("replay")
def replay_delivery(
    context: typer.Context,
    webhook_id: WebhookId,
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY", help="The message's id.")],
) -> None:
    """Send a message again. It keeps its id."""
    context.obj.replay_delivery(webhook_id, delivery_id)
    typer.echo(f"{delivery_id} will be sent again")


@webhooks_app.command("remove")
def remove_webhook(context: typer.Context, webhook_id: WebhookId) -> None:
    """Remove a webhook, with its messages."""
    context.obj.delete_webhook(webhook_id)
    typer.echo(f"{webhook_id} removed")


def _print_secret(webhook: SecretWebhookView) -> None:
    tell("its secret, shown only now: the receiver verifies each message with it")
    typer.echo(webhook["secret"])


@app.command()
def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Show one method with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods with their papers, or show one of them."""
    if name is None:
        print_list(context.obj.methods(), as_json, tables.method_table, "no methods")
        return
    method = context.obj.method(name)
    if as_json:
        print_json(method)
    else:
        output().print(*tables.method_page(method), sep="\n")


@app.command()
def architectures(
    context: typer.Context,
    family: Annotated[str | None, typer.Option()] = None,
    source: Annotated[str | None, typer.Option(help="kdcore or torchvision.")] = "kdcore",
    classes: Annotated[int, typer.Option(min=2, help="Parameters are counted for so many classes.")] = 10,
    channels: Annotated[int, typer.Option(min=1, help="Parameters are counted for so many channels.")] = 3,
    as_json: AsJson = False,
) -> None:
    """List the networks for teachers and students."""
    rows = context.obj.architectures(family=family, source=source or None, classes=classes, channels=channels)
    if not rows and source == "timm":
        raise InvalidInput("--source timm: its networks are not listed; timm/<name> takes each of timm.list_models()")
    if not rows:
        known = context.obj.architectures()
        families = sorted({row["family"] for row in known if source in (None, "", row["source"])})
        sources = sorted({row["source"] for row in known})
        way = f"its families are {', '.join(families)}" if families else f"sources are {', '.join(sources)}"
        asked = f"source {source!r}" + (f" and family {family!r}" if family else "")
        raise InvalidInput(f"there are no networks of {asked}; {way}")
    print_list(rows, as_json, tables.architecture_table, "")


@app.command()
def workers(context: typer.Context, as_json: AsJson = False) -> None:
    """List the workers with their devices."""
    if_empty = "no workers: distillery up starts one with the server"
    print_list(context.obj.workers(), as_json, tables.worker_table, if_empty)


@app.command()
def storage(
    context: typer.Context,
    collect: Annotated[
        bool, typer.Option("--collect", help="First delete what nothing needs any more (the operator's key).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show disk usage, free disk space, and what the collector removed."""
    if collect:
        context.obj.collect()
    answer = context.obj.storage()
    if as_json:
        print_json(answer)
        return
    console = output()
    console.print(tables.usage_table(answer))
    print_lines(console, tables.disk_space_line(answer))
    if answer["collections"]:
        console.print(tables.collection_table(answer["collections"]))


@app.command()
def limits(
    context: typer.Context,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", help="Set limits: jobs_running=4 bytes_stored=default. Operator only."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="Only the operator names one. Default: yours.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the limits of a project and what is used, or set some."""
    answer = context.obj.limits(project)
    if changes:
        answer = context.obj.set_limits(answer["project"], dict(map(_limit, changes)))
    if as_json:
        print_json(answer)
        return
    output().print(tables.limits_table(answer))


def _limit(text: str) -> tuple[str, int | None]:
    name, _, value = text.partition("=")
    if value == "default":
        return name, None
    if not (name and value.isascii() and value.isdigit()):
        raise InvalidInput(f"{text} is no limit; write NAME=NUMBER, or NAME=default")
    return name, int(value)


@app.command()
def audit(
    context: typer.Context,
    action: Annotated[str | None, typer.Option(help="As in job.submit, key.revoke.")] = None,
    resource: Annotated[str | None, typer.Option(help="The id or name of what was acted on.")] = None,
    key: Annotated[str | None, typer.Option(help="The id or name of a key.")] = None,
    refused: Annotated[bool, typer.Option("--refused", help="Only what was refused for lack of rights.")] = False,
    project: Annotated[str | None, typer.Option(help="For the operator. Default: all.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="2026-11-29T00:00:00Z")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most entries.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show who did what to which resource, newest first. For admins of a project and the operator."""
    outcome = "refused" if refused else None
    filters = {"action": action, "resource": resource, "key": key, "outcome": outcome, "project": project}
    entries = list(islice(context.obj.audit(**filters, since=since, until=until), limit))
    print_list(entries, as_json, tables.audit_table, "no entries")


KeyId = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as in `keys list`.")]
OfProject = Annotated[str | None, typer.Option(help="Only the operator names one. Default: that of your key.")]


@keys_app.command("list")
def list_keys(context: typer.Context, project: OfProject = None, as_json: AsJson = False) -> None:
    """List the keys, newest first, with the ended ones."""
    keys = list(context.obj.keys(project=project))
    print_list(keys, as_json, tables.key_table, "no keys: distillery keys create NAME --role operator")


@keys_app.command("create")
def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Whose it is, as it is shown on jobs: ann, ci-nightly.")],
    role: Annotated[Role, typer.Option(help="At most that of your own key.")] = "member",
    project: OfProject = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="It can be used for this time: 8h, 30d. Default: no end.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is printed once, alone on standard output; the server stores only its SHA-256."""
    expires_in_s = None if expires is None else round(parse_duration(expires))
    made = context.obj.create_key(name, role=role, project=project, expires_in_s=expires_in_s)
    _print_key(made, as_json)


@keys_app.command("rotate")
def rotate_key(context: typer.Context, key_id: KeyId, as_json: AsJson = False) -> None:
    """Give a key another secret, which is printed once. The old one ends within five seconds."""
    _print_key(context.obj.rotate_key(key_id), as_json)


@keys_app.command("revoke")
def revoke_key(context: typer.Context, key_id: KeyId) -> None:
    """End a key for good, everywhere within five seconds."""
    context.obj.revoke_key(key_id)
    typer.echo(f"{key_id} revoked")


def _print_key(made: NewKeyView, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    tell(f"{made['id']}, {made['role']} of {made['project']}; shown only now, for DISTILLERY_API_KEY:")
    typer.echo(made["key"])


@projects_app.callback()
def list_projects(context: typer.Context, as_json: AsJson = False) -> None:
    if context.invoked_subcommand is None:
        print_list(list(context.obj.projects()), as_json, tables.project_table, "no projects")


@projects_app.command("create")
def create_project(
    context: typer.Context, name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens.")]
) -> None:
    """Make a project. Its first key: keys create NAME --project PROJECT --role admin."""
    project = context.obj.create_project(name)
    typer.echo(f"{project['name']} created")
    tell(f"its first key: distillery keys create NAME --role admin --project {project['name']}")


@projects_app.command("delete")
def delete_project(context: typer.Context, name: Annotated[str, typer.Argument()]) -> None:
    """Delete a project that has no jobs, models, data sets and uploads, and end its keys."""
    context.obj.delete_project(name)
    typer.echo(f"{name} deleted")


@keys_app.command("new")
def new_key() -> None:
    """Make the operator's key without a server. It is printed once; the server's settings get only its SHA-256."""
    key = f"distillery_{secrets.token_urlsafe(32)}"
    typer.echo(f"key, shown only now (clients: DISTILLERY_API_KEY):\n  {key}")
    typer.echo(f"for the server:\n  DISTILLERY_ADMIN_KEY_HASH={hashlib.sha256(key.encode()).hexdigest()}")
