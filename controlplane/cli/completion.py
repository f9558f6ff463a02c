"""`sandloom completion bash|zsh`: a completion script made from the table of commands.

The script knows nouns, verbs, options and choices; names of sandboxes and images it asks `sandloom ... -o name`, with
the global options that are already on the line. zsh runs the same function through its bashcompinit.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.cli.command import AnyCommand, Command, Shell
from controlplane.cli.parser import GLOBALS_WITH_VALUE, Table, build

SHELLS = ("bash", "zsh")
FILE_METAVARS = ("FILE", "DIR", "PATH")
ASK = {"live": "ps", "sandbox": "ps -a", "image": "image ls", "pool": "pool ls", "checkpoint": "checkpoint ls"}

SCRIPT = r"""# completion of sandloom for bash; load it with: source <(sandloom completion bash)
_sandloom_files() {
  compopt -o filenames 2>/dev/null
  local IFS=$'\n'
  COMPREPLY=($(compgen -f -- "$1"))
}
_sandloom() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="" command="" word="" next="" i=1
  local -a asked=()
  COMPREPLY=()
  ((COMP_CWORD > 0)) && prev="${COMP_WORDS[COMP_CWORD-1]}"
  while ((i < COMP_CWORD)); do
    word="${COMP_WORDS[i]}"
    case "$word" in
      --) return 0 ;;
      @globals@) asked+=("$word" "${COMP_WORDS[i+1]}"); ((i++)) ;;
      -*) ;;
      *)
        case "${command:+$command }$word" in
          @prefixes@) command="${command:+$command }$word" ;;
        esac ;;
    esac
    ((i++))
  done
  case "$command $prev" in
@values@
    *" --home"|*" --tls-dir") _sandloom_files "$cur"; return 0 ;;
    *" --address"|*" --context"|*" --tenant") return 0 ;;
  esac
  case "$command" in
@commands@
  esac
  case "$cur" in
    -*) COMPREPLY=($(compgen -W "$options @all@" -- "$cur")); return 0 ;;
  esac
  case "$next" in
    file) _sandloom_files "$cur" ;;
    ask:*) COMPREPLY=($(compgen -W "$("${COMP_WORDS[0]}" "${asked[@]}" ${next#ask:} -o name 2>/dev/null)" -- "$cur")) ;;
    *) COMPREPLY=($(compgen -W "$next" -- "$cur")) ;;
  esac
}
complete -o bashdefault -F _sandloom sandloom
"""
ZSH_HEAD = """#compdef sandloom
# completion of sandloom for zsh; load it with: source <(sandloom completion zsh)
autoload -U +X compinit && compinit -u
autoload -U +X bashcompinit && bashcompinit
setopt local_options no_nomatch 2>/dev/null
"""


@dataclass(frozen=True)
class OptionWords:
    """A command's options as words, and what the values of some of them may be ("file" or choices)."""

    words: tuple[str, ...]
    values: Mapping[str, str]


def option_words(command: AnyCommand) -> OptionWords:
    """Taken from the parser itself, so that the script never lags behind."""
    words: list[str] = []
    values: dict[str, str] = {}
    for action in build(command)._actions:
        for word in action.option_strings:
            words.append(word)
            if action.nargs == 0 or word in GLOBALS_WITH_VALUE:
                continue
            if action.choices is not None:
                values[word] = " ".join(map(str, action.choices))
            else:
                values[word] = "file" if action.metavar in FILE_METAVARS else ""
    return OptionWords(tuple(words), values)


def script(table: Table, shell: str) -> str:
    """The completion script. Pure."""
    nouns = dict.fromkeys(words[0] for words in table)
    groups = {noun: [words[1] for words in table if words[0] == noun and len(words) > 1] for noun in nouns}
    prefixes = [*nouns, *(" ".join(words) for words in table if len(words) > 1)]
    cases = [_case("", (), " ".join(nouns))]
    values: dict[str, list[str]] = {}
    for noun, verbs in groups.items():
        if verbs and (noun,) not in table:
            cases.append(_case(noun, (), " ".join(verbs)))
    for words, command in table.items():
        found = option_words(command)
        cases.append(_case(" ".join(words), found.words, _operand(command)))
        for word, value in found.values.items():
            values.setdefault(value, []).append(f'"{" ".join(words)} {word}"')
    filled = SCRIPT
    for name, text in (
        ("globals", "|".join(GLOBALS_WITH_VALUE)),
        ("prefixes", "|".join(f'"{prefix}"' for prefix in prefixes)),
        ("values", "\n".join(_value(patterns, value) for value, patterns in values.items())),
        ("commands", "\n".join(cases)),
        ("all", " ".join([*GLOBALS_WITH_VALUE, "--quiet", "--help"])),
    ):
        filled = filled.replace(f"@{name}@", text)
    return filled if shell == "bash" else ZSH_HEAD + filled.split("\n", 1)[1]


def _operand(command: AnyCommand) -> str:
    if command.words == ("completion",):
        return " ".join(SHELLS)
    return f"ask:{ASK[command.operand]}" if command.operand in ASK else command.operand


def _case(command: str, options: tuple[str, ...], following: str) -> str:
    return f'    "{command}") local options="{" ".join(options)}"; next="{following}" ;;'


def _value(patterns: list[str], value: str) -> str:
    """One case for all options whose values are the same."""
    reply = '_sandloom_files "$cur"' if value == "file" else f'COMPREPLY=($(compgen -W "{value}" -- "$cur"))'
    return f"    {'|'.join(patterns)}) {reply}; return 0 ;;"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="bash|zsh", help="which shell the script is for")


def command_for(table: Table) -> Command[str]:
    """The command; it needs the very table that it is in."""

    def act(shell_name: str, shell: Shell) -> int:
        shell.printer.write(script(table, shell_name))
        return 0

    return Command(
        words=("completion",),
        summary="print a completion script for bash or zsh",
        configure=configure,
        parse=lambda ns: str(ns.shell),
        act=act,
        examples=("source <(sandloom completion bash)",),
    )
