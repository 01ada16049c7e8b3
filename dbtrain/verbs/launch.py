"""`dbtrain launch NAME [options] -- train|batch run ...`: a verb for each row of `LAUNCHERS`."""

import inspect
import os
from typing import Annotated, Any, get_type_hints

import typer

from dbtrain.verbs.options import group, print_json
from dbtrain_launchers import LAUNCHERS
from dbtrain_launchers.plan import VISIBLE, Launcher, make_plan

MACHINES = ("nodes", "gpus", "cpus", "name")
"""Options of the plan. A launcher has those that its row names."""


def verb(launcher: Launcher) -> Any:
    """A command for typer: it renders a plan, then prints the text, or starts it and exits with its code.

    Its options are the words, the plan's options that the launcher's row names, and the options of `render`.
    """

    def shared(
        words: Annotated[list[str], typer.Argument(metavar="-- WORDS...", help="What to run.")],
        nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
        gpus: Annotated[int, typer.Option(help="GPUs of each machine; 0 asks for none.")] = 0,
        cpus: Annotated[int, typer.Option(help="CPU cores of each; 0 is the launcher's default.")] = 0,
        name: Annotated[str, typer.Option(help="Name of the job.")] = "dbtrain",
        env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Variable; no secrets.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, and send nothing.")] = False,
    ) -> None: ...

    common, own = inspect.signature(shared).parameters, inspect.signature(launcher.render).parameters
    kept = [option for name, option in common.items() if name not in MACHINES or name in launcher.machines]
    parameters = [*kept, *list(own.values())[1:]]

    def run(words: list[str], env: list[str] | None, dry_run: bool, as_json: bool, **given: Any) -> None:
        options = {key: given.pop(key) for key in list(own)[1:]}
        rendered = launcher.render(make_plan(words, env or (), visible=os.environ.get(VISIBLE), **given), **options)
        if as_json:
            print_json({"command": list(rendered.command), "stdin": rendered.stdin})
        elif dry_run:
            typer.echo(rendered.text, nl=False)
        else:
            raise typer.Exit(launcher.start(rendered))

    run.__doc__ = launcher.render.__doc__
    hints = get_type_hints(shared, include_extras=True) | get_type_hints(launcher.render, include_extras=True)
    keywords = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in parameters
    ]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {keyword.name: keyword.annotation for keyword in keywords}
    return run


app = group(
    f"Start a run on machines: {', '.join(LAUNCHERS)}.",
    "dbtrain launch slurm --nodes 2 --dry-run -- batch run all.csv --config sdxl_lora --out runs",
    {},
)
for launcher_name, row in LAUNCHERS.items():
    app.command(launcher_name, context_settings={"allow_interspersed_args": False})(verb(row))
APPS = {"launch": app}
