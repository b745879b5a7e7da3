"""``python -m gpukern``: the command line, where its script is not on the path."""

from gpukern.cli import app

app(prog_name="gpukern")
