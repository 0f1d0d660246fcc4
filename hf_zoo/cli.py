"""`hf-zoo VERB ...`: the one command line; every verb is also `python -m hf_zoo.VERB`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from hf_zoo.errors import ZooError, nearest

VERBS = {
    "pretrain": "train a population of fresh or continued models",
    "finetune": "train a population from parents",
    "merge": "merge members into one model",
    "curvature": "measure members' Fisher information and Gram matrices",
    "publish": "push a population or a merge to a Hub",
    "list": "list a population's members, factors and results",
    "hub": "serve a folder as a Hub on this machine",
    "register": "make `hf zoo VERB` work too",
}

USAGE = """usage: hf-zoo VERB ...

Train, publish, merge and understand populations of neural networks.

verbs:
{verbs}

`hf-zoo VERB --help` says more; every RECIPE is a YAML file, and `key.path=value` after it overrides a key."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status: 0, 1 for failed members, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())))
        return 0
    if arguments[0] in ("-V", "--version"):
        from hf_zoo import __version__

        print(f"hf_zoo {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"hf-zoo: unknown verb {verb!r}{nearest(verb, list(VERBS))}: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    home = {"list": "listing", "curvature": "measuring", "hub": "serving", "register": "extension"}.get(verb, verb)
    return import_module(f"hf_zoo.{home}").main(rest)


def guarded(body: Callable[[], int]) -> int:
    """Run a verb's body: a user's mistake becomes one message on standard error and status 2, without traceback."""
    try:
        return body()
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `hf-zoo list ... | head`
        return 0
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
