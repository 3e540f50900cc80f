"""Hold a conversation through the model's chat template, without a server.

    python examples/chat.py

Each question goes to the model with all turns before it. Their keys and values are still in the prefix cache, so that
only what is new is computed. Name questions of your own: ``python examples/chat.py "Who are you?" "Since when?"``.
"""

import argparse

from dynamoe import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=["What is the capital of France?", "And of Italy?"])
    parser.add_argument("--model", default="default", help="any model with a chat template")
    arguments = parser.parse_args()

    llm = LLM(arguments.model)
    params = SamplingParams(temperature=0, max_tokens=64)
    messages = []
    for question in arguments.questions:
        messages.append({"role": "user", "content": question})
        (result,) = llm.chat(messages, params, use_tqdm=False)
        answer = result.outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        print(f"user:      {question}")
        print(f"assistant: {answer}")
        print(
            f"           ({len(result.prompt_token_ids)} tokens in, {result.num_cached_tokens} of them from the cache)"
        )


if __name__ == "__main__":
    main()
