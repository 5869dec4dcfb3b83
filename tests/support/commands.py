"""Whether a command line of ``dmdd`` that stands in a file is one."""

from __future__ import annotations

from typing import Any

import typer

from pipeline.cli import app

COMMAND: Any = typer.main.get_command(app)


def check(words: list[str], where: str) -> list[str]:
    """Fail unless command, subcommands and options exist and take what is given.

    Returns:
        The command's arguments without its options.
    """
    command, rest, line = COMMAND, words, f"{where}: dmdd {' '.join(words)}"
    while hasattr(command, "commands"):
        assert rest, line
        assert rest[0] in command.commands, line
        command, rest = command.commands[rest[0]], rest[1:]
    options = {
        name: parameter
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }
    arguments: list[str] = []
    while rest:
        word, rest = rest[0], rest[1:]
        if not word.startswith("-"):
            arguments.append(word)
            continue
        assert word in options, f"{line}: no option {word}"
        if not options[word].is_flag:
            assert rest, f"{line}: {word} needs a value"
            rest = rest[1:]
    taken = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    assert len(arguments) <= len(taken), f"{line}: too many arguments"
    assert len(arguments) >= sum(parameter.required for parameter in taken), f"{line}: an argument is missing"
    return arguments
