"""Checks a certificate of dynamoe from its own files. Needs Python and numpy, and imports nothing of dynamoe:

    python verify_certificate.py CERTIFICATE.json… [--deployment RUNNING.json] [--weights MODEL_DIRECTORY]

It derives the proof again from the stored losses: of every setting of the path up to the certified one, and of outputs
cut at every length, the hypothesis "the risk exceeds alpha" must be rejected at delta. It finds an edited certificate,
edited or missing losses, a setting or a deployment that is not the measured one and, given what runs, other weights,
kernels, precision. Nobody has signed these files: whoever measures other losses can write another certificate, which
has another id. Compare the id with that of a certificate that you trust.

Exit code: 0 verified, 1 refused, 2 nothing to derive the proof from. Shape suffixes: N requests, T tokens, K lengths.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np

OF_EXITS = "exits.safetensors"  # beside the weights, and hashed apart from them


def wsr(losses_N, alpha, delta):
    """P-value by betting (Waudby-Smith & Ramdas): one over the greatest wealth of bets on losses below alpha."""
    count = len(losses_N)
    seen_N = np.arange(1, count + 1)
    means_N = (0.5 + losses_N.cumsum()) / (1 + seen_N)
    variances_N = (0.25 + ((losses_N - means_N) ** 2).cumsum()) / (1 + seen_N)
    before_N = np.concatenate(([0.25], variances_N[:-1]))
    stakes_N = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (count * before_N)))
    with np.errstate(divide="ignore"):
        log_wealth = np.log1p(-stakes_N * (losses_N - alpha)).cumsum().max()
    return math.exp(-max(0.0, log_wealth))


def binomial_cdf(successes, count, share):
    """P(at most so many successes)."""
    k = np.arange(min(successes, count) + 1)
    logs = np.array([math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in k])
    return float(np.exp(logs + k * math.log(share) + (count - k) * math.log1p(-share)).sum())


def hoeffding_bentkus(losses_N, alpha, delta):
    """P-value: the smaller one of Hoeffding's bound in relative entropy and Bentkus' e times the binomial tail."""
    count, mean = len(losses_N), float(losses_N.mean())
    low = min(mean, alpha)
    entropy = low * math.log(low / alpha) if low > 0 else 0.0
    entropy += (1 - low) * math.log((1 - low) / (1 - alpha)) if low < 1 else 0.0
    bentkus = math.e * binomial_cdf(math.ceil(count * mean - 1e-9), count, alpha)
    return min(1.0, math.exp(-count * entropy), bentkus)


def exact_binomial(losses_N, alpha, delta):
    """P-value for losses that are 0 or 1."""
    if not np.isin(losses_N, (0, 1)).all():
        raise ValueError("exact_binomial is for losses that are 0 or 1")
    return binomial_cdf(int(losses_N.sum()), len(losses_N), alpha)


METHODS = {"wsr": wsr, "hoeffding_bentkus": hoeffding_bentkus, "exact_binomial": exact_binomial}


def hash_of(value, **options):
    """SHA-256 of JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, **options).encode()).hexdigest()


def cut_means(losses_NT, shortest, fill):
    """Of every request, the mean loss of its output cut at each length from `shortest` on, (K, N).

    `fill`: outputs that ended count as lost from there on, as far as the cut reaches; else their mean stays.
    """
    ended_NT = np.isnan(losses_NT)
    counts_NT = np.arange(1, losses_NT.shape[1] + 1)[None]
    if not fill:
        counts_NT = np.minimum(counts_NT, (~ended_NT).sum(1)[:, None])
    sums_NT = np.where(ended_NT, float(fill), losses_NT).cumsum(1)
    return (sums_NT / counts_NT)[:, shortest - 1 :].T


def read_losses(file):
    """A file of losses: its record, and the losses of tokens, (N, T), NaN behind an output's end."""
    record = json.loads(file.read_text())
    losses = np.frombuffer(zlib.decompress(base64.b64decode(record["losses"])), dtype="<f4").astype(np.float64)
    return record, losses.reshape(-1, record["max_tokens"])


def problems_of_losses(certificate, folder):
    """Why the losses do not prove what the certificate says, in words."""
    scope, found, last = certificate["scope"], [], None
    for number, name in enumerate(certificate["evidence"], 1):
        file = folder / f"{name}.json"
        if not file.is_file():
            return [*found, f"losses of setting {number} are missing: {file}"]
        if hashlib.sha256(file.read_bytes()).hexdigest() != name:
            return [*found, f"losses of setting {number} were changed: {file} does not hash to its name"]
        last, losses_NT = read_losses(file)
        if losses_NT.shape != (certificate["requests"], scope["max_tokens"]):
            found.append(f"setting {number}: losses of {losses_NT.shape} (requests, tokens), not what is certified")
            continue
        if not (np.isnan(losses_NT) | ((losses_NT >= 0) & (losses_NT <= 1))).all():
            found.append(f"setting {number}: losses outside 0 … 1")
            continue
        if last.get("temperature", 0.0) != scope["highest_temperature"]:
            found.append(f"setting {number}: measured at another temperature")
        for fill in (False, True) if scope.get("ignore_eos") else (False,):
            cuts = cut_means(losses_NT, scope["min_tokens"], fill)
            test = METHODS[certificate["method"]]
            p_K = [test(cut_N, certificate["alpha"], certificate["delta"]) for cut_N in cuts]
            if max(p_K) > certificate["delta"]:
                length = scope["min_tokens"] + int(np.argmax(p_K))
                what = " with ignore_eos" if fill else ""
                found.append(
                    f"setting {number} of the path is not proved{what}: p = {max(p_K):.3g} for outputs cut at {length}"
                    f" tokens, delta = {certificate['delta']:g}"
                )
    assert last is not None
    setting, budget = last["setting"], certificate["expert_budget"]
    if {k: float(v) for k, v in setting["exit_thresholds"].items()} != certificate["exit_thresholds"]:
        found.append(f"exit_thresholds are not those whose losses were measured: {setting['exit_thresholds']}")
    measured = {name: setting[name] for name in ("expert_keep", "experts_per_token") if setting.get(name) is not None}
    if measured != budget:
        found.append(f"expert_budget is not the one whose losses were measured: {measured}")
    if last.get("deployment") != hash_of(certificate["deployment"]):
        found.append("deployment is not the one whose losses were measured")
    return found


def problems(file, running=None, weights=None):
    """Why a certificate is refused, in words; and whether there were losses to derive the proof from.

    Arguments:
        file: path of the certificate; `losses/` lies beside it.
        running: names and values of the deployment that runs.
        weights: directory of safetensors files.
    """
    certificate = json.loads(Path(file).read_text())
    content = {name: value for name, value in certificate.items() if name not in ("format", "id")}
    found = []
    own = hash_of(content, separators=(",", ":"), allow_nan=False)[:16]
    if own != certificate["id"]:
        found.append(f"the certificate was changed: it names the id {certificate['id']}, its content has {own}")
    deployment = certificate["deployment"]
    if running is not None:
        for name in sorted({*deployment, *running}):
            if deployment.get(name) != running.get(name):
                found.append(f"{name}: certified for {deployment.get(name)!r}, {running.get(name)!r} runs")
    if weights is not None:
        digest = hashlib.sha256()
        for part in sorted(part for part in Path(weights).glob("*.safetensors") if part.name != OF_EXITS):
            digest.update(part.name.encode() + hashlib.sha256(part.read_bytes()).digest())
        if digest.hexdigest() != deployment["weights"]:
            found.append(f"weights: certified for {deployment['weights']}, {weights} has {digest.hexdigest()}")
    evidence = bool(certificate.get("evidence"))
    return found + (problems_of_losses(certificate, Path(file).parent / "losses") if evidence else []), evidence


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("certificates", nargs="+", help="files")
    parser.add_argument("--deployment", help="JSON of what runs: `dynamoe certificate deployment model=…`")
    parser.add_argument("--weights", help="directory of the model")
    options = parser.parse_args()
    running = json.loads(Path(options.deployment).read_text()) if options.deployment else None
    code = 0
    for file in options.certificates:
        found, evidence = problems(file, running, options.weights)
        word = "refused" if found else "verified" if evidence else "unproven: no losses are stored with it"
        print(f"{file}: {word}", *found, sep="\n  ")
        code = max(code, 1 if found else 0 if evidence else 2) if code != 1 else 1
    sys.exit(code)


if __name__ == "__main__":
    main()
