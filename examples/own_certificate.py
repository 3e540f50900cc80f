"""Make certificates for your own requests and machine with ``dynamoe calibrate``, then generate under them.

    python examples/own_certificate.py

A calibration runs prompts like those to be served at several settings, compares each with the full model, and proves
for a level of risk how much may be saved. So few prompts prove little: only a high alpha. A real one takes about 1000.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dynamoe import LLM, Quality, SamplingParams

BEGINNINGS = ("To install", "To remove", "The documentation of", "The configuration of", "The author of", "By default,")
THINGS = "server editor kernel package shell database compiler library archive module mail printer clock disk font user"
PROMPTS = [f"{beginning} the {thing}" for thing, beginning in itertools.product(THINGS.split(), BEGINNINGS)]
SETTINGS = [
    "model=tiny",
    "alphas=[0.1]",
    "requests=80",
    "test_requests=16",
    "max_tokens=24",
    "probabilities=[0.98,0.93]",
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        files = [f"prompts={prompts}", f"output={folder}/calibration"]
        subprocess.run([sys.executable, "-m", "dynamoe", "calibrate", *SETTINGS, *files], check=True)

        llm = LLM("tiny", certificates=f"{folder}/calibration/certificates")
        covered = {"temperature": 0, "max_tokens": 24}
        for title, params in {
            "exact": SamplingParams(**covered),
            "alpha=0.1": SamplingParams(**covered, quality=Quality(alpha=0.1)),
            "alpha=0.1, longer than calibrated": SamplingParams(
                temperature=0, max_tokens=32, quality=Quality(alpha=0.1)
            ),
            "alpha=0.01, stricter than proved": SamplingParams(**covered, quality=Quality(alpha=0.01)),
        }.items():
            (result,) = llm.generate("To install the compiler", params, use_tqdm=False)
            layers = result.outputs[0].layers
            print(f"\n{title}: {result.outputs[0].text!r}\n  {sum(layers) / len(layers):.2f} layers per token")
            if result.contract is not None:
                print(f"  {result.contract.reason}")


if __name__ == "__main__":
    main()
