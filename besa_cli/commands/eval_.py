"""`besa eval`: the group of the commands that measure the quality lost."""

import typer

from besa_cli.commands.eval_compare import compare
from besa_cli.commands.eval_ppl import ppl
from besa_cli.commands.eval_sample import sample
from besa_cli.commands.eval_tasks import tasks

app = typer.Typer(no_args_is_help=True, help="Measure what was lost.", rich_markup_mode=None)
app.command()(ppl)
app.command()(sample)
app.command()(tasks)
app.command()(compare)
