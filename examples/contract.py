"""Ask a server for an answer under a quality contract, and see what it got and what that cost.

    python examples/contract.py

starts a server of ``tiny``, which comes with certificates; ``--base-url http://127.0.0.1:8000/v1`` takes one that runs.
The same prompt is completed exactly, and then with the risk ``alpha``: of the tokens, in the mean over requests, at
most that share may differ from what all layers would have chosen. Certificates hold for the kind of processor that they
were calibrated on: elsewhere the request runs exactly, and ``reason`` says so (then calibrate: own_certificate.py).
"""

import httpx
from running_server import running_server, server_arguments


def main() -> None:
    parser = server_arguments(__doc__, model="tiny")
    parser.add_argument("--alpha", type=float, default=0.05, help="risk that the request accepts")
    arguments = parser.parse_args()

    with running_server(arguments.base_url, arguments.model) as base_url, httpx.Client(timeout=120) as client:
        for contract in client.get(f"{base_url}/contracts").raise_for_status().json()["data"]:
            print(f"available: alpha={contract['alpha']}, delta={contract['delta']}, certificate {contract['id']}")
        for quality in ("exact", {"alpha": arguments.alpha}):
            body = {"prompt": "To install the package,", "temperature": 0, "max_tokens": 48, "quality": quality}
            answer = client.post(f"{base_url}/completions", json=body).raise_for_status().json()
            compute = answer["usage"]["compute"]
            print(f"\nquality={quality}: {answer['choices'][0]['text']!r}")
            print(f"  {compute['quality']}, certificates: {compute['certificates']}, reason: {compute['reason']}")
            shares = (
                f"{compute[name] / compute['full_' + name]:.1%} of the {name}" for name in ("flops", "weight_bytes")
            )
            print(f"  {compute['layers_per_token']:.2f} layers per token, {', '.join(shares)} of full compute")


if __name__ == "__main__":
    main()
