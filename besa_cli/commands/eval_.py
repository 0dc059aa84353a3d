"""`besa eval`: the group of the commands that measure the quality lost."""

import typer

from besa_cli.commands.eval_compare import compare
from besa_cli.commands.eval_ppl import ppl
from besa_cli.commands.eval_sample import sample
from besa_cli.commands.eval_tasks import tasks
from besa_cli.commands.shared.panels import HelpCommand, HelpGroup

_HELP = """Measure the quality lost.

Examples:

    besa eval ppl wikitext2 --limit 8
    besa eval tasks piqa,boolq --limit 100
    besa eval compare run-50 run-60 run-70
"""

app = typer.Typer(cls=HelpGroup, help=_HELP, no_args_is_help=True, rich_markup_mode=None)
app.command(cls=HelpCommand)(ppl)
app.command(cls=HelpCommand)(sample)
app.command(cls=HelpCommand)(tasks)
app.command(cls=HelpCommand)(compare)
