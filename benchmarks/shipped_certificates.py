"""Makes the certificates that ship with ``tiny``: ``make certificates``, or this script.

One calibration for each instruction set that certificates ship for and that this processor has, by its name; results do
not depend on which processor runs them. What an earlier run has measured is not measured again, as long as nothing that
it depends on has changed. The new certificates take the place of the old ones of the same instruction set, and those of
an earlier format go; ``ledger.jsonl`` beside them keeps what was ever tried.
"""

import argparse
import shutil
from pathlib import Path

import torch
from benchmark import ROOT
from dynamoe.dynamic.contract.catalog import CERTIFICATES
from dynamoe.dynamic.contract.certificate import LOSSES, OutdatedCertificate, load_certificate
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.studies.calibrate import CalibrateConfig, calibrate
from dynamoe.dynamic.studies.ledger import LEDGER
from dynamoe.kernels.cpu import build

ISAS = ("avx512bf16", "avx512vnni")
PATH = {0.99: 0.85, 0.98: 0.85, 0.96: 0.8, 0.92: 0.75, 0.84: 0.7}  # 1 - probability doubles; expert_keep beside it


def install(found: Path, shipped: Path, backend: str) -> None:
    """Put certificates and the ledger where the package has them."""
    for file in shipped.glob("*.json"):
        try:
            outdated = load_certificate(file).deployment["backend"] == backend
        except OutdatedCertificate:
            outdated = True
        if outdated:
            file.unlink()
    for file in found.glob("*.json"):
        shutil.copyfile(file, shipped / file.name)
    needed = {name for file in shipped.glob("*.json") for name in load_certificate(file).evidence}
    (shipped / LOSSES).mkdir(exist_ok=True)
    for losses in (found / LOSSES).glob("*.json"):
        shutil.copyfile(losses, shipped / LOSSES / losses.name)
    for losses in (shipped / LOSSES).glob("*.json"):
        if losses.stem not in needed:
            losses.unlink()
    ledger = shipped / LEDGER
    known = ledger.read_text().splitlines() if ledger.exists() else []
    lines = dict.fromkeys([*known, *(found / LEDGER).read_text().splitlines()])
    ledger.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isas", nargs="*", default=ISAS, help="instruction sets")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "certificates", help="directory of the runs")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--test-requests", type=int, default=500)
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args()
    build.load()
    shipped = resolve_model("tiny") / CERTIFICATES
    for isa in options.isas:
        if torch.ops.dynamoe_cpu.find_isa(isa) < 0:
            print(f"this processor has no {isa}: its certificates cannot be made here")
            continue
        config = CalibrateConfig(
            model="tiny",
            backend=f"cpu:{isa}",
            output=str(options.output / isa),
            requests=options.requests,
            test_requests=options.test_requests,
            max_tokens=options.max_tokens,
            probabilities=tuple(PATH),
            keeps=tuple(PATH.values()),
            threads=options.threads,
        )
        install(calibrate(config), shipped, f"cpu {isa}")


if __name__ == "__main__":
    main()
