"""What depth and exits are worth in the tiny model: three runs compared on the same held-out text.

``python benchmarks/tiny_report.py`` trains ``tiny``, ``tiny_no_exits`` and ``tiny_shallow`` one after the other, each
into ``runs/NAME``, resuming interrupted runs; then it writes ``results/tiny.json``. Overrides of
``dynamoe train`` may follow: ``python benchmarks/tiny_report.py max_minutes=10`` gives each unfinished run ten minutes.

The perplexity of a genre is the geometric mean over its packages, apart for packages that training never saw.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "tiny.json"
RECIPES = ("tiny", "tiny_no_exits", "tiny_shallow")
MOST_FOR_EXITS, LEAST_FOR_DEPTH = 1.02, 1.10


def finish(recipe: str, output: Path, overrides: list[str]) -> bool:
    """Train a recipe, or continue it, unless its report is there. Returns whether it is now.

    Raises:
        subprocess.CalledProcessError: when training fails.
    """
    report = output / "report.json"
    if not report.exists():
        command = [sys.executable, "-m", "dynamoe", "train", f"recipe={recipe}", f"output={output}", *overrides]
        subprocess.run(command, check=True)
    return report.exists()


def by_genre(report: dict[str, Any]) -> dict[str, float]:
    """Perplexity per genre, keys ``genre/known`` and ``genre/unseen``."""
    logs: dict[str, list[float]] = {}
    for stream, known in report["known_streams"].items():
        perplexity = report["evaluation"].get(f"perplexity/{stream}")
        if perplexity is not None:
            key = f"{stream.split('/')[0]}/{'known' if known else 'unseen'}"
            logs.setdefault(key, []).append(math.log(perplexity))
    return {key: math.exp(sum(values) / len(values)) for key, values in sorted(logs.items())}


def compare(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The three runs side by side.

    Arguments:
        reports: ``report.json`` of each of ``RECIPES``.

    Returns: perplexities, their ratios (overall and per genre) and whether the two requirements hold.
    """
    overall = {name: report["evaluation"]["perplexity"] for name, report in reports.items()}
    genres = {name: by_genre(report) for name, report in reports.items()}
    tiny = genres["tiny"]
    exits = {k: v for k, v in reports["tiny"]["evaluation"].items() if k.split("/")[-1].startswith("exit_")}
    cost, gain = overall["tiny"] / overall["tiny_no_exits"], overall["tiny_shallow"] / overall["tiny"]
    return {
        "perplexity": overall,
        "perplexity_by_genre": genres,
        "at_exits": exits,
        "tiny_over_no_exits": cost,
        "tiny_over_no_exits_by_genre": {k: v / genres["tiny_no_exits"][k] for k, v in tiny.items()},
        "shallow_over_tiny": gain,
        "shallow_over_tiny_by_genre": {k: genres["tiny_shallow"][k] / v for k, v in tiny.items()},
        "exits_cost_at_most_2_percent": cost <= MOST_FOR_EXITS,
        "depth_is_worth_at_least_10_percent": gain >= LEAST_FOR_DEPTH,
        "training_seconds": {name: report["seconds"] for name, report in reports.items()},
        "threads": {name: report["threads"] for name, report in reports.items()},
    }


def main() -> None:
    """Train what is missing, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of the three runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the comparison goes")
    options, overrides = parser.parse_known_args()
    unfinished = [name for name in RECIPES if not finish(name, options.runs / name, overrides)]
    if unfinished:
        print(f"unfinished: {', '.join(unfinished)}; the same command goes on")
        return
    result = compare({name: json.loads((options.runs / name / "report.json").read_text()) for name in RECIPES})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
