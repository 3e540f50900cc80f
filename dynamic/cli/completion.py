"""Tab completion: scripts for shells, which ask ``dynamoe --complete SHELL LINE`` for the words that may follow."""

from __future__ import annotations

from .commands import CERTIFICATE_ACTIONS, COMMANDS, Command

# Bash takes `=` for the end of a word, so that only what follows it is completed; the others complete whole words.
SCRIPTS = {
    "bash": """_dynamoe() {
    local IFS=$'\\n'
    COMPREPLY=($(dynamoe --complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
}
complete -o nospace -o default -F _dynamoe dynamoe
""",
    "zsh": """#compdef dynamoe
_dynamoe() {
    local -a found
    found=("${(@f)$(dynamoe --complete zsh "${LBUFFER}" 2>/dev/null)}")
    compadd -Q -S '' -- ${found:#} || _files
}
compdef _dynamoe dynamoe
""",
    "fish": """complete -c dynamoe -f -a '(dynamoe --complete fish (commandline -cp | string collect) 2>/dev/null)'
""",
}


def completion_script(shell: str) -> str:
    """The script that a shell evaluates: ``eval "$(dynamoe completion bash)"``.

    Raises:
        ValueError: for another shell.
    """
    if shell not in SCRIPTS:
        raise ValueError(f"there is completion for {', '.join(SCRIPTS)}, not for {shell!r}")
    return SCRIPTS[shell]


def candidates(shell: str, line: str) -> list[str]:
    """Words that may follow.

    Arguments:
        shell: which asks.
        line: what was typed, up to the cursor.

    Returns: commands, settings (``engine.seed=``), or a setting's values where they are known: presets, true and false.
    """
    words = line.split()
    current = "" if not words or line[-1].isspace() else words.pop()
    if len(words) < 2:
        return [
            f"{name} "
            for name in (*(c.name for c in COMMANDS), "certificate", "completion")
            if name.startswith(current)
        ]
    if words[1] == "completion":
        return [name for name in SCRIPTS if name.startswith(current)]
    if words[1] == "certificate":
        return [f"{name} " for name in CERTIFICATE_ACTIONS if len(words) == 2 and name.startswith(current)]
    command = next((command for command in COMMANDS if command.name == words[1]), None)
    if command is None:
        return []
    name, equals, value = current.partition("=")
    if not equals:
        return sorted(f"{name}=" for name in _settings(command) if name.startswith(current))
    values = [known for known in _settings(command).get(name, ()) if known.startswith(value)]
    return values if shell == "bash" else [f"{name}={known}" for known in values]


def _settings(command: Command) -> dict[str, list[str]]:
    """Settings of a command, and their values where these are known."""
    from .config import keys
    from .help import presets

    listed = keys(command.load(command.config)())
    return {key.path: ["true", "false"] if isinstance(key.default, bool) else [] for key in listed} | presets(command)
