"""The manual of all commands as Markdown: `python -m svb.cli.manual > docs/commands.md`."""

from __future__ import annotations

import click

from svb.cli import cli


def manual() -> str:
    """Return the help of every command, in the order the data flows."""
    parts = ["# Commands\n\nWhat `svb COMMAND --help` prints.\n"]
    with click.Context(cli, info_name="svb", terminal_width=100, **cli.context_settings) as root:
        for name in cli.list_commands(root):
            command = cli.commands[name]
            with click.Context(command, info_name=name, parent=root, terminal_width=100) as context:
                parts.append(f"## svb {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    click.echo(manual(), nl=False)
