"""`ehr-msn --completion bash|zsh|fish`: a static script for tab completion, made from the parsers and the schemas.

Completes commands, their flags and choices, names of shipped configs, `key=` and the values of keys with a few choices;
elsewhere files. The script starts no Python, so a TAB is instant; print it anew after an update.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from dataclasses import dataclass, field

from configs import UserError, cli, shipped
from configs.commands import COMMANDS, OF_LAUNCH_SH
from configs.keys import keys

PROGRAMS = ("ehr-msn", "launch.sh")
NO_CHOICE = {"text", "number", "section", "null"}  # types of keys that read like a choice
SCHEMA = re.compile(r"schema=.*schemas/(\w+)\.json")


@dataclass
class Takes:
    """What a command takes: flag -> choices (None: it takes no value), configs, key -> choices."""

    does: str
    flags: dict[str, list[str] | None] = field(default_factory=dict)
    says: dict[str, str] = field(default_factory=dict)
    configs: list[str] = field(default_factory=list)
    keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def valued(self) -> dict[str, list[str]]:
        return {flag: choices for flag, choices in self.flags.items() if choices is not None}


def script(shell: str) -> str:
    """The script. Raises: UserError: another shell."""
    if shell not in SCRIPTS:
        raise UserError(f"--completion {shell}: wanted one of {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]({name: _takes(name) for name in COMMANDS})


def _takes(name: str) -> Takes:
    """Read a command's parser, and the schema of its config if it has one."""
    row = COMMANDS[name]
    top: argparse.ArgumentParser = importlib.import_module(f"{row.module}.__main__").parser()
    subparsers = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    takes = Takes(row.does)
    for action in subparsers.choices[row.subcommand]._actions:
        for flag in action.option_strings:
            takes.flags[flag] = None if action.nargs == 0 else list(map(str, action.choices or ()))
            takes.says[flag] = action.help or ""
        if isinstance(action, cli.Keys):
            takes.keys = {key.name: _choices(key.type) for key in keys(action.schema) if not key.is_section}
            takes.configs = _configs("features" if name == "check" else name)
    if name == "config":
        takes.configs = list(shipped.names())
    return takes


def _choices(type_: str) -> list[str]:
    words = type_.split(" | ")
    named = [word for word in words if re.fullmatch(r"[\w.+-]+", word) and word not in NO_CHOICE]
    return [word for word in words if word in named or word == "null"] if named else []


def _configs(name: str) -> list[str]:
    """The shipped configs of a command, by the schema that they name in their header."""
    found = []
    for config, path in shipped.names().items():
        named = SCHEMA.search(path.read_text(encoding="utf-8").partition("\n")[0])
        if named and named[1] == name:
            found.append(config)
    return found


# ---- bash: `=` breaks words, so that `seed=1` is three of them


def _bash(commands: dict[str, Takes]) -> str:
    values, words = [], []
    for name, takes in commands.items():
        given = {**takes.keys, **takes.valued}
        values += [f"    {name}:{key}) words={shlex.quote(' '.join(v))} ;;" for key, v in given.items() if v]
        names = " ".join([*takes.configs, *(f"{key}=" for key in takes.keys)])
        words.append(f"    {name}) flags={shlex.quote(' '.join(takes.flags))} words={shlex.quote(names)} ;;")
    known = " ".join([*commands, *OF_LAUNCH_SH, "help", "--completion"])
    return BASH.format(known=known, values="\n".join(values), words="\n".join(words), programs=" ".join(PROGRAMS))


BASH = r"""# bash completion of ehr-msn; in ~/.bashrc:  source <(ehr-msn --completion bash)
_ehr_msn() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} name=${{COMP_WORDS[1]}}
  local before='' key='' words='' flags=''
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 ]]; then COMPREPLY=($(compgen -W '{known}' -- "$cur")); return; fi
  if [[ $name == --completion ]]; then COMPREPLY=($(compgen -W 'bash zsh fish' -- "$cur")); return; fi
  if [[ $cur == '=' ]]; then key=$prev cur=''
  elif [[ $prev == '=' ]]; then key=${{COMP_WORDS[COMP_CWORD-2]}}
  elif [[ $cur == *=* ]]; then key=${{cur%%=*}} before=${{cur%%=*}}= cur=${{cur#*=}}
  elif [[ $prev == -* ]]; then key=$prev
  fi
  case $name:$key in
{values}
  esac
  if [[ -n $words ]]; then COMPREPLY=($(compgen -P "$before" -W "$words" -- "$cur")); return; fi
  if [[ -z $key || $key == -* ]]; then
    case $name in
{words}
    esac
    [[ $cur == -* ]] && words=$flags
    [[ -n $cur || $key != -* ]] && COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [[ ${{#COMPREPLY[@]}} -gt 0 ]]; then
      [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
      return
    fi
  fi
  local IFS=$'\n'
  COMPREPLY=($(compgen -P "$before" -f -- "$cur"))
  compopt -o filenames 2>/dev/null
}}
complete -F _ehr_msn {programs}
"""


# ---- zsh


def _zsh(commands: dict[str, Takes]) -> str:
    def said(word: str, says: str) -> str:
        return shlex.quote(f"{word.replace(':', chr(92) + ':')}:{says}")

    listed = [said(name, takes.does) for name, takes in commands.items()]
    values, words = [], []
    for name, takes in commands.items():
        given = {**takes.keys, **takes.valued}
        values += [f"    {name}:{key}) choices=({shlex.join(v)}) ;;" for key, v in given.items() if v]
        flags = " ".join(said(flag, " ".join(takes.says[flag].split())) for flag in takes.flags)
        named, valued = shlex.join(takes.configs), shlex.join(takes.keys)
        words.append(f"    {name}) flags=({flags}) configs=({named}) valued=({valued}) ;;")
    return ZSH.format(
        programs=" ".join(PROGRAMS), commands="\n    ".join(listed), values="\n".join(values), words="\n".join(words)
    )


ZSH = r"""#compdef {programs}
# zsh completion of ehr-msn; in ~/.zshrc, after compinit:  source <(ehr-msn --completion zsh)
_ehr_msn() {{
  local -a commands flags configs valued choices
  local name=${{words[2]}} key=''
  commands=(
    {commands}
  )
  if (( CURRENT == 2 )); then _describe command commands; return; fi
  if [[ $PREFIX == *=* ]]; then key=${{PREFIX%%=*}}; compset -P '*='
  elif [[ ${{words[CURRENT-1]}} == -* ]]; then key=${{words[CURRENT-1]}}
  fi
  case $name:$key in
{values}
  esac
  if (( $#choices )); then compadd -- $choices; return; fi
  case $name in
{words}
  esac
  if [[ $PREFIX == -* ]]; then _describe flag flags; return; fi
  if [[ -z $key || $key == -* ]]; then compadd -- $configs; compadd -S '' -- ${{^valued}}=; fi
  _files
}}
(( $+functions[compdef] )) && compdef _ehr_msn {programs}
"""


# ---- fish


def _fish(commands: dict[str, Takes]) -> str:
    lines = ["# fish completion of ehr-msn; once:  ehr-msn --completion fish > ~/.config/fish/completions/ehr-msn.fish"]
    for program in PROGRAMS:
        start = f"complete -c {program}"
        for name, takes in commands.items():
            here = f'{start} -n "__fish_seen_subcommand_from {name}"'
            lines.append(f"{start} -n __fish_use_subcommand -f -a {name} -d {_quoted(takes.does)}")
            for flag in (f for f in takes.flags if f.startswith("--")):
                choices = takes.flags[flag]
                value = "" if choices is None else f" -x -a {_quoted(' '.join(choices))}" if choices else " -r"
                lines.append(f"{here} -l {flag[2:]}{value} -d {_quoted(takes.says[flag])}")
            if takes.configs:
                lines.append(f"{here} -a {_quoted(' '.join(takes.configs))} -d config")
            pairs = [f"{key}={value}" for key, values in takes.keys.items() for value in values or [""]]
            if pairs:
                lines.append(f"{here} -a {_quoted(' '.join(pairs))} -d key")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + " ".join(text.split()).replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
