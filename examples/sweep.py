"""Sweep over contracts through the command line: what each gives up and what it saves, as one table.

    python examples/sweep.py

runs ``dynamoe sweep`` on few prompts, so that the intervals are wide; leave ``requests=`` and ``texts=`` out for a real
one. ``--output DIRECTORY`` keeps the table, the plots and the configurations to serve; the same command then goes on
where it was interrupted. It needs ``pip install 'dynamoe[sweep]'``.
"""

import argparse
import csv
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = ["model=tiny", "quality.alpha=null,0.02,0.1", "requests=24", "texts=8", "max_tokens=32", "timing_groups=2"]
COLUMNS = ("agreement", "layers_share", "flops_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory of the sweep; left out, a temporary one")
    output = parser.parse_args().output
    if output is not None:
        sweep(output)
        return
    with tempfile.TemporaryDirectory() as folder:
        sweep(Path(folder))


def sweep(output: Path) -> None:
    """Run the sweep and print its table."""
    command = ["dynamoe", "sweep", *SETTINGS, f"output={output}"]
    print(shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)
    print(f"{'alpha':>8} " + " ".join(f"{name + ' (95 %)':>28}" for name in COLUMNS))
    with (output / "table.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            cells = [
                f"{float(row[c]):.3f} ({float(row[c + '_low']):.3f} … {float(row[c + '_high']):.3f})" for c in COLUMNS
            ]
            print(f"{row['config.quality.alpha'] or 'exact':>8} " + " ".join(f"{cell:>28}" for cell in cells))
    print("files:", ", ".join(sorted(path.name for path in output.iterdir())))


if __name__ == "__main__":
    main()
