"""After how many monitored requests a contract is reverted: ``python benchmarks/monitor_drift.py``.

Requests are served under certificates of the model ``tiny`` that hold on this machine, judged by the full pass that the
monitor makes, and their losses bet against the certificate's claim, one after the other. Four streams: prompts of the
kind that was calibrated on, which neither calibration nor test saw; tables of numbers; random tokens; and the first
with probes that are too sure of themselves, as after a mistake in a conversion. A drift that does no harm must not be
found: each stream's mean loss is reported as well. Written to ``results/monitor_drift_tiny.json``.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import RESULTS, command_line, surroundings, write
from dynamoe.dynamic.contract.catalog import CertificateSource, ContractCatalog, spent_under
from dynamoe.dynamic.contract.certificate import Certificate
from dynamoe.dynamic.contract.e_process import EProcess
from dynamoe.dynamic.contract.served_loss import disagreements
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.studies.requests import draw
from dynamoe.dynamic.text.prompt_file import read_prompts
from safetensors.torch import load_file, save_file
from tqdm import tqdm

UNSEEN = 500  # prompts that neither chose nor tested the shipped certificates
AT_ONCE = 25
CORRUPT = 4.0  # added to the logits of all probes


def with_sure_probes(source: Path, target: Path) -> Path:
    """A copy of a model whose probes let more rows exit than they should."""
    shutil.copytree(source, target)
    file = target / "exits.safetensors"
    tensors = load_file(file)
    save_file({name: t + CORRUPT if name.endswith(".probe.out_bias") else t for name, t in tensors.items()}, file)
    return target


def stream(llm: LLM, prompts: list[list[int]], certificate: Certificate) -> dict[str, Any]:
    """Serve prompts until the bet fires or they end."""
    params = SamplingParams(temperature=0.0, max_tokens=certificate.scope.max_tokens, detokenize=False)
    bet = EProcess.start(certificate.alpha, certificate.delta)
    for start in range(0, len(prompts), AT_ONCE):
        part = [list(prompt) for prompt in prompts[start : start + AT_ONCE]]
        outputs = llm.generate(part, spent_under(certificate, params), use_tqdm=False)
        for loss in disagreements(llm.model.decoder, outputs).tolist():
            bet = bet.observe(loss)
            if bet.fired:
                return {"fired_at": bet.fired_at, "mean_loss": bet.mean}
    return {"fired_at": None, "mean_loss": bet.mean, "requests": bet.count}


def unseen(prompts: list[list[int]], catalog: ContractCatalog) -> list[list[int]]:
    """Prompts that the calibration of the shipped certificates has not drawn."""
    used = max(c.requests + c.held_out.requests for c in catalog.contracts.certificates)
    return draw(prompts, len(prompts), 0, "the file")[used:][:UNSEEN]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--requests", type=int, default=UNSEEN, help="of each stream, at most")
    parser.add_argument("--alphas", type=float, nargs="*", help="levels; all in the catalog otherwise")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve_model("tiny")
    llm = LLM("tiny", progress=False)
    catalog = CertificateSource(llm.engine).read()
    if not catalog.contracts.certificates:
        raise SystemExit(f"no certificate of tiny holds here: {'; '.join(catalog.refused)}")
    usual = unseen(read_prompts(path / "prompts.jsonl", llm.get_tokenizer()), catalog)[: args.requests]
    rng = np.random.default_rng(0)
    random = [rng.integers(1, llm.model.spec.vocab_size, len(prompt)).tolist() for prompt in usual]
    rows = [" ".join(str(number) for number in rng.integers(0, 10_000, 12)) for _ in usual]
    numbers = [llm.get_tokenizer().encode(row) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        corrupt = LLM(with_sure_probes(path, Path(folder) / "tiny"), progress=False)
        streams = {
            "usual": (llm, usual),
            "numbers": (llm, numbers),
            "random tokens": (llm, random),
            "corrupted probes": (corrupt, usual),
        }
        records = []
        certificates = [c for c in catalog.contracts.certificates if not args.alphas or c.alpha in args.alphas]
        pairs = [(c, name) for c in certificates for name in streams]
        for certificate, name in tqdm(pairs, unit="stream"):
            model, prompts = streams[name]
            found = stream(model, prompts, certificate)
            records.append({"alpha": certificate.alpha, "delta": certificate.delta, "stream": name, **found})
            tqdm.write(json.dumps(records[-1]))
    result = {**surroundings(), "requests": len(usual), "streams": records}
    write(RESULTS / "monitor_drift_tiny.json", result)


if __name__ == "__main__":
    main()
