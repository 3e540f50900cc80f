"""Decode time and memory of the cache by the length of a context: ``python benchmarks/context_plot.py FILE.json …``.

The files are what the shapes' benchmarks print (``gpt_oss_shape.py``, ``deepseek_v2_lite_shape.py``); a line for each,
or for each kind of cache in it, named as the file. Needs matplotlib.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmark import RESULTS, command_line

Points = list[tuple[int, float, float]]  # tokens, milliseconds, MiB


def lines(name: str, report: dict[str, Any]) -> Iterator[tuple[str, Points]]:
    """What a report, or a part of it, has measured at several lengths, by its name."""
    points = [
        (int(match[1]), entry["milliseconds"], entry["cache_mib"])
        for key, entry in report.items()
        if (match := re.fullmatch(r"decode_1_at_(\d+)", key))
    ]
    if points:
        yield name, sorted(points)
    for key, part in report.items():
        if isinstance(part, dict):
            yield from lines(f"{name}, {key}", part)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=RESULTS / "context_shapes.svg")
    options = parser.parse_args()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, bytes_held = figure.subplots(1, 2)
    for file in options.files:
        for name, points in lines(file.stem, json.loads(file.read_text())):
            lengths, milliseconds, mib = zip(*points, strict=True)
            times.plot(lengths, milliseconds, marker="o", label=name)
            bytes_held.plot(lengths, mib, marker="o", label=name)
    for axes, label in ((times, "ms per decoded token, one request"), (bytes_held, "MiB of the cache")):
        axes.set(xlabel="tokens of context", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    times.legend(fontsize=8)
    figure.savefig(options.output)


if __name__ == "__main__":
    main()
