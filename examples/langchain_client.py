"""Use a server from LangChain: a prompt template, the model and a parser as one chain; alone, streamed, in a batch.

    python examples/langchain_client.py

starts a server for itself; ``--base-url http://127.0.0.1:8000/v1`` takes one that runs. It needs
``pip install langchain-openai``.
"""

import sys

from running_server import running_server, server_arguments

try:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI
except ImportError:
    sys.exit("This example needs LangChain's OpenAI client: pip install langchain-openai")


def main() -> None:
    arguments = server_arguments(__doc__, model="default").parse_args()

    with running_server(arguments.base_url, arguments.model) as base_url:
        model = ChatOpenAI(
            base_url=base_url, api_key="none", model=arguments.model, temperature=0, max_completion_tokens=32
        )
        chain = ChatPromptTemplate.from_template("What is the capital of {country}?") | model | StrOutputParser()
        print("invoke:", chain.invoke({"country": "Japan"}))
        print("stream:", "|".join(chain.stream({"country": "Egypt"})))
        for answer in chain.batch([{"country": "Germany"}, {"country": "China"}]):
            print("batch:", answer)

        # What OpenAI's API does not have goes into extra_body; what the request cost comes back in the metadata.
        answer = model.bind(extra_body={"quality": {"alpha": 0.05}}).invoke("What is the capital of Greece?")
        compute = answer.response_metadata["token_usage"]["compute"]
        print(f"contract: {answer.content} ({compute['quality']}: {compute['reason']})")


if __name__ == "__main__":
    main()
