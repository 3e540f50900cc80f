"""Read an answer while it is written, with OpenAI's own client.

    python examples/streaming_client.py

starts a server for itself. To use one that runs already (``make serve``), name it:
``python examples/streaming_client.py --base-url http://127.0.0.1:8000/v1``. The client is ``pip install openai``.
"""

import sys
import time

from running_server import running_server, server_arguments

try:
    from openai import OpenAI
except ImportError:
    sys.exit("This example needs OpenAI's client: pip install openai")


def main() -> None:
    arguments = server_arguments(__doc__, model="default").parse_args()

    with running_server(arguments.base_url, arguments.model) as base_url:
        client = OpenAI(base_url=base_url, api_key="none")
        served = client.models.list().data[0].id
        question = {"role": "user", "content": "Name three colours and say where each is seen in nature."}
        began, arrivals = time.perf_counter(), []
        stream = client.chat.completions.create(
            model=served,
            messages=[question],
            temperature=0,
            max_tokens=96,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                arrivals.append(f"{time.perf_counter() - began:.2f} s")
                print(chunk.choices[0].delta.content, end="", flush=True)
            if chunk.usage is not None:  # the last chunk, which has no choices
                print(f"\n\n{served}: {chunk.usage.completion_tokens} tokens in {len(arrivals)} pieces")
        print("the first after", *arrivals[:1], "and the last after", *arrivals[-1:])


if __name__ == "__main__":
    main()
