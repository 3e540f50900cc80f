"""Share one model between two processes: each keeps half of the heads and half of the neurons.

    torchrun --nproc-per-node 2 examples/two_processes.py

Both processes run this file. The line that makes the ``LLM`` returns in the first one only; the second works inside it
until the first ends. Other axes are ``expert_parallel_size``, ``pipeline_parallel_size`` and ``data_parallel_size``
(docs/parallelism.md); their product is the number of processes.
"""

import argparse
import os
import sys

from dynamoe import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a directory, a .gguf file, default or tiny")
    model = parser.parse_args().model
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != 2:
        sys.exit("Start this with a launcher: torchrun --nproc-per-node 2 examples/two_processes.py")

    llm = LLM(model, tensor_parallel_size=processes)
    print(f"process {os.environ['RANK']} of {processes} asks:")
    prompts = ["The capital of France is", "The opposite of cold is"]
    for result in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False):
        print(f"{result.prompt!r} -> {result.outputs[0].text!r}")


if __name__ == "__main__":
    main()
