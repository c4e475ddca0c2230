"""What every stage does first: options in groups, presets, seeds."""

import argparse
import contextlib
import functools
import os
import re
import shlex
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from userip.artifacts import fail, lock


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is; behind an option's text its default, where that is a number, a word or words"""

    def _get_help_string(self, action):
        default, text = action.default, action.help or ""
        if default in (None, argparse.SUPPRESS) or isinstance(default, bool) or "default" in text:
            return text
        words = map(str, default if isinstance(default, (list, tuple)) else [default])
        return f"{text} (default: {' '.join(words)})"


def stage_parser(doc):
    """A parser whose --help is the stage's docstring, and `add`: add_argument of each group of options."""
    formatter = functools.partial(HelpFormatter, width=110, max_help_position=32)
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False,
                                     usage="%(prog)s [options]")
    parser.error = lambda message: fail(f"{message}; see --help")  # one line, without the usage block
    parse_args = parser.parse_args
    parser.parse_args = lambda argv=None: parse_args(
        refuse_blanks(parser, sys.argv[1:] if argv is None else argv))
    add = SimpleNamespace(**{group: parser.add_argument_group(group).add_argument
                             for group in ("data", "method", "training", "machine")})
    add.data("--run-dir", default="runs/demo", help="folder of this run's artifacts")
    return parser, add


def refuse_blanks(parser, argv):
    """The words of a command line; a blank one is an unset variable of the shell, as in --llm "$LLM" """
    option = "the command line"
    for word in argv:
        option, _, value = word.partition("=") if word.startswith("--") else (option, "", word)
        if not value.strip() and word != option:
            parser.error(f"{option} is empty or blank")
    return argv


def at_least(minimum, kind=int, at_most=None):
    """The type of an option whose number has limits: argparse then refuses it with one line."""
    largest = at_most or (1e30 if kind is float else 2**32 - 1)

    def parse(text):
        number = kind(text)
        if not minimum <= number <= largest:  # written this way, it refuses nan, too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum} to {largest:g}")
        return number

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def option_name(name):
    """"run_dir" -> "--run-dir\""""
    return f"--{name.replace('_', '-')}"


def options_text(options):
    """A preset as one would type it: {"lr": 0.1, "whiten": False} -> "--lr 0.1 --no-whiten"."""
    text = lambda value: shlex.join(map(str, value if isinstance(value, list) else [value]))
    return " ".join(f"--no-{name}" if value is False else f"{option_name(name)} {text(value)}"
                    for name, value in options.items())


def parse_with_presets(parser, argv, **presets):
    """Parse; a preset that was chosen (--paper) sets its options first, so that typed ones override it."""
    args = parser.parse_args(argv)
    for name, options in presets.items():
        if getattr(args, name):
            parser.set_defaults(**options)
            print(f"--{name} = {options_text(options)}")
    if sum(getattr(args, name) for name in presets) > 1:
        parser.error(f"{' and '.join(map(option_name, presets))} are different recipes: choose one")
    return parser.parse_args(argv)


def changed_options(parser, args, ignored=()):
    """The names of the options that differ from their defaults, but for those ignored."""
    return [name for name in vars(args) if name not in ignored
            and getattr(args, name) != parser.get_default(name)]


def refuse_without_effect(parser, args, conditions):
    """Refuse an option that nothing reads: conditions {option: (does anything read it?, what would)}"""
    for name in changed_options(parser, args):
        is_read, reader = conditions.get(name, (True, ""))
        if not is_read:
            parser.error(f"{option_name(name)} means nothing without {reader}: leave it out")


def start_stage(args):
    """Seed the generators of numpy and torch, print the options. Same seed, same bits, on CUDA, too."""
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else runs on CUDA may differ
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, for finding errors only
    options = " ".join(f"{name}={value}" for name, value in sorted(vars(args).items()) if value is not None)
    print(f"{Path(sys.argv[0]).name} | {options}")


def process_rank():
    """Rank and number of the processes of torchrun; 0 and 1 without it"""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(world)) if rank.isdigit() and world.isdigit() and int(world) > 1 else (0, 1)


def run_program(main, parse_args, is_shared=False):
    """A stage as a program, alone on its run directory; Ctrl-C and what a disk refuses end in one line.

    is_shared: processes of torchrun share its work, and the first one holds the run directory
    """
    warnings.simplefilter("ignore")  # they are for developers; what users should know is printed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on as KeyboardInterrupt
    try:
        args = parse_args()
        is_first = not (is_shared and process_rank()[0])
        with lock(args.run_dir) if is_first else contextlib.nullcontext():
            main(args)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; what was finished is kept", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror or error}; is it a file of this run, and is "
             f"there room and the right to write?")
    except (MemoryError, RuntimeError) as error:
        if not re.search(r"out of memory|not enough memory|allocat", str(error), re.I):
            raise
        fail(f"memory does not suffice ({str(error).splitlines()[0][:120]}): take smaller numbers")
