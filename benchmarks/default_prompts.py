"""Questions about Python's own library, for calibrations of chat models: ``python benchmarks/default_prompts.py FILE``.

One JSON object per line with ``messages``, as ``dynamoe calibrate prompts=FILE`` reads it: what does this function do,
for functions and methods of the standard library that have a docstring, in an order that a seed draws.
"""

import argparse
import importlib
import inspect
import json
import pkgutil
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

SKIPPED = {"antigravity", "idlelib", "test", "this", "tkinter", "turtle", "turtledemo", "lib2to3", "__main__"}
ASKED = (
    "What does {name} do in Python?",
    "Explain {name}{signature} in a few words.",
    "When would I use {name}?",
    "Give an example of {name}{signature}.",
)


def modules() -> Iterator[ModuleType]:
    """The public modules of the standard library that can be imported here."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED:
            continue
        names = [name]
        try:
            module = importlib.import_module(name)
            names += [f"{name}.{sub.name}" for sub in pkgutil.iter_modules(getattr(module, "__path__", []))]
        except ImportError:
            continue
        for full in names:
            if any(part.startswith("_") or part in SKIPPED for part in full.split(".")):
                continue
            try:
                yield importlib.import_module(full)
            except ImportError:
                continue


def functions(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Full name and signature of what a module itself defines and explains."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        holders = [(f"{module.__name__}.{name}", value)]
        if inspect.isclass(value):
            methods = sorted(vars(value).items())
            holders += [(f"{module.__name__}.{name}.{m}", f) for m, f in methods if not m.startswith("_")]
        for full, thing in holders:
            if not (callable(thing) and inspect.getdoc(thing)):
                continue
            try:
                yield full, str(inspect.signature(thing))
            except (TypeError, ValueError):
                yield full, "()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sorted({pair for module in modules() for pair in functions(module)})
    draw = random.Random(0)
    draw.shuffle(found)
    with options.file.open("w", encoding="utf-8") as file:
        for name, signature in found[: options.count]:
            question = draw.choice(ASKED).format(name=name, signature=signature if len(signature) < 80 else "(…)")
            file.write(json.dumps({"messages": [{"role": "user", "content": question}]}, ensure_ascii=False) + "\n")
    print(f"{min(options.count, len(found))} of {len(found)} questions in {options.file}")


if __name__ == "__main__":
    main()
