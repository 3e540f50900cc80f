"""Look at probabilities: how sure the model is of each token that it writes, and which of several sentences it expects.

    python examples/logprobs.py

Log-probabilities are natural logarithms, and those of the raw logits, before penalties and temperature.
"""

import argparse
import math

from dynamoe import LLM, SamplingParams

SENTENCES = ("The sun rises in the east.", "The sun rises in the west.", "The sun rises in the soup.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a directory, a .gguf file, default or tiny")
    llm = LLM(parser.parse_args().model)

    prompt = "The capital of France is"
    (result,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4, logprobs=3), use_tqdm=False)
    print(f"{prompt!r} goes on with")
    output = result.outputs[0]
    for token_id, candidates in zip(output.token_ids, output.logprobs, strict=True):
        best = sorted(candidates.values(), key=lambda candidate: candidate.rank)
        others = ", ".join(f"{other.decoded_token!r} {math.exp(other.logprob):.1%}" for other in best[:3])
        print(f"  {candidates[token_id].decoded_token!r} of {others}")

    # A prompt's first token has nothing in front of it, so that there is no probability for it.
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for result in llm.generate(SENTENCES, params, use_tqdm=False):
        pairs = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
        logprobs = [position[token_id].logprob for token_id, position in pairs]
        perplexity = math.exp(-sum(logprobs) / len(logprobs))
        print(f"{result.prompt!r}: log-probability {sum(logprobs):.2f}, perplexity {perplexity:.1f}")


if __name__ == "__main__":
    main()
