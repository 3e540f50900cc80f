"""Models whose weights are quantised while they are loaded: against dequantised weights, and in the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.convert.model_config import ModelConfig
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import allocate_layers
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.quantization import Quantization, methods
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.tolerance import error
from dynamoe.kernels.api.types import AttentionBatch
from safetensors.torch import load_file, save_file

PAGE = 16


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length))


def logits_of(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Of every position of one prompt, (T, V)."""
    length = len(ids)
    pages = -(-length // PAGE)
    kv = allocate_layers(decoder.spec, pages, PAGE, decoder.dtype, decoder.device)
    batch = AttentionBatch(
        positions_T=torch.arange(length),
        slots_T=torch.arange(length),
        query_start_S1=torch.tensor([0, length], dtype=torch.int32),
        context_len_S=torch.tensor([length], dtype=torch.int32),
        block_table_SM=torch.arange(pages, dtype=torch.int32)[None],
        max_query_len=length,
        max_context_len=length,
    )
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(ids), kv, batch))


CASES = [("mixtral", method) for method in methods()]
CASES += [(family, method) for family in ("qwen2", "qwen2_moe") for method in ("int8", "w8a8", "int4")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_logits_are_those_of_the_oracle(make_checkpoint: Callable[..., Path], family: str, method: str) -> None:
    path, ids = make_checkpoint(family), prompt_of(37)
    oracle = load_decoder(path, dtype="float32", backend="torch", device="cpu", quantization=method)
    expected = logits_of(oracle, ids)
    plain = logits_of(load_decoder(path, dtype="float32", backend="cpu"), ids)
    assert error(plain, expected) > 1e-3  # quantisation does something
    rounded = methods()[method].scheme.kind != "none"
    decoder = load_decoder(path, dtype="float32", backend="cpu", quantization=method)
    if rounded:  # a rounding that goes the other way is a step, and the layers behind it see it
        assert apart(logits_of(decoder, ids), expected) <= apart(plain, expected) / 4
    else:
        assert error(logits_of(decoder, ids), expected) <= 2e-5
    decoder = load_decoder(path, dtype="bfloat16", backend="cpu", quantization=method)
    plain16 = load_decoder(path, dtype="bfloat16", backend="cpu")
    assert decoder.weight_bytes < plain16.weight_bytes
    # Rows near a tie of a router go another way than the oracle's, in bfloat16 with or without quantisation; and rows
    # that are rounded amplify any difference up to what rounding changes at all.
    most = 2 * apart(plain, expected) if rounded else 3 * apart(logits_of(plain16, ids), plain)
    assert apart(logits_of(decoder, ids), expected) <= most


def apart(logits_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """Median over rows of the distance, as a share of the row's length."""
    return ((logits_TV - expected_TV).norm(dim=-1) / expected_TV.norm(dim=-1)).median().item()


def test_the_oracle_is_a_model_of_dequantised_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path, ids = make_checkpoint("mixtral"), prompt_of(21)
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    method, head = methods()["int4-g32-asym"], methods()["int8"]
    weights = {}
    for name, weight in load_file(path / "model.safetensors").items():
        kind = head if "embed" in name or "lm_head" in name else method
        kept = weight.dim() < 2 or ".gate.weight" in name
        weights[name] = weight if kept else kind.quantize(weight).dequantize().to(weight.dtype).contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = logits_of(load_decoder(tmp_path, dtype="float32", backend="torch", device="cpu"), ids)
    for backend in ("torch", "cpu"):
        decoder = load_decoder(path, dtype="float32", backend=backend, device="cpu", quantization="int4-g32-asym")
        assert error(logits_of(decoder, ids), expected) <= 2e-5


@pytest.mark.parametrize("method", ["int8", "w8a8", "int4", "fp8"])
def test_exits_and_budgets_do_not_depend_on_the_rows_beside(make_exits: Callable[..., Path], method: str) -> None:
    path = make_exits("qwen3_moe", {1: 0.4, 3: 0.4}, num_hidden_layers=4)
    llm = LLM(path, backend="cpu", dtype="bfloat16", quantization=method, progress=False, enable_prefix_caching=False)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (5, 17, 2, 40)]
    params = SamplingParams(
        temperature=0,
        max_tokens=12,
        ignore_eos=True,
        quality=None,
        exit_thresholds={1: 0.5, 3: 0.5},
        experts_per_token=2,
    )
    alone = [llm.generate([p], params, use_tqdm=False)[0].outputs[0] for p in prompts]
    together = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
    assert [(o.token_ids, o.layers) for o in together] == [(o.token_ids, o.layers) for o in alone]
    assert len({layers for output in alone for layers in output.layers}) > 1, "some leave, some stay"
    facts = deployment(llm.model, llm.engine.runner.exits)
    assert facts["quantisation"] == f"{method}, LM head and embedding int8"


def test_the_head_can_stay_as_it_is(make_checkpoint: Callable[..., Path]) -> None:
    path, ids = make_checkpoint("mixtral"), torch.tensor([5, 7])
    plain = load_decoder(path, dtype="float32", backend="cpu")
    kept = load_decoder(path, dtype="float32", backend="cpu", quantization="int8", quantize_lm_head=False)
    assert torch.equal(kept.embed(ids), plain.embed(ids))
    assert kept.quantization == "int8"
    assert not torch.equal(load_decoder(path, backend="cpu", quantization="int8").embed(ids), plain.embed(ids))


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quantization must be none, int8, int8-g32, w8a8, int4, .*, not 'int3'"):
        Quantization(method="int3")
    assert ModelConfig(quantization="int8").load_arguments()["config"].quantization == "int8"
