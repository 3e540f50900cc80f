"""Complete several prompts at once, without a server.

    python examples/offline_batch.py

The engine runs all prompts in the same steps, however many there are, and each one samples as its own settings say.
``--model tiny`` starts faster and says less.
"""

import argparse

from dynamoe import LLM, SamplingParams

PROMPTS = {
    "The capital of France is": SamplingParams(temperature=0, max_tokens=12),
    "Water boils at": SamplingParams(temperature=0, max_tokens=24, stop=(".",)),
    "Once upon a time": SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24, n=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a directory, a .gguf file, default or tiny")
    llm = LLM(parser.parse_args().model)
    for result in llm.generate(list(PROMPTS), list(PROMPTS.values())):
        for output in result.outputs:
            print(f"{result.prompt!r} -> {output.text!r} ({len(output.token_ids)} tokens, {output.finish_reason})")


if __name__ == "__main__":
    main()
