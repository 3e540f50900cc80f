"""Layers with recurrent states in the C++ stack: the bits of single operations for any weights, cuts, neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_exits
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.kv_cache import allocate_layers
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.stack import build_stack
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.stack import NotStacked
from engine_answers import answers
from family_parity import Variant
from test_cpu_stack import assert_equal_steps, batch_of, one_by_one
from test_decoder import random_prompts
from test_families_parity_latent import FAST as LATENT
from test_families_parity_nemotron import BAMBA
from test_families_parity_states import GRANITE, LFM2_MOE, NEXT

MODELS = {
    "qwen3_next": Variant(family="qwen3_next", config=NEXT),
    "qwen3_5_moe": Variant(family="qwen3_5_moe_text", config=NEXT),
    "granitemoehybrid": Variant(family="granitemoehybrid", config={**GRANITE, "mamba_n_groups": 2}),
    "bamba": Variant(family="bamba", config=BAMBA),
    "lfm2_moe": Variant(family="lfm2_moe", config={**LFM2_MOE, "conv_bias": True}),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name].save(tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"quantization": "int8"},
        {"quantization": "w8a8", "kv_cache_dtype": "int8"},
        {"quantization": "int4-g32-asym"},
    ],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.parametrize("name", MODELS)
def test_a_stack_with_states_equals_its_operations(
    folder_of: Callable[[str], Path], name: str, options: dict[str, str]
) -> None:
    """Three sequences, in three steps, with copies of their states in between."""
    decoder = load_decoder(folder_of(name), backend="cpu", **options)
    assert decoder.stack is not None
    assert_equal_steps(decoder, limited=any(layer.moe for layer in decoder.spec.layers))


@pytest.mark.parametrize("name", MODELS)
def test_no_cut_and_no_number_of_threads_changes_a_stack(folder_of: Callable[[str], Path], name: str) -> None:
    decoder = load_decoder(folder_of(name), dtype="bfloat16", backend="cpu")
    tokens_T, whole = torch.arange(3, 26), Segment(index=0, layers=range(decoder.spec.num_layers))

    def run(cuts: list[int]) -> torch.Tensor:
        kv = allocate_layers(decoder.spec, 24, 4, decoder.kv_dtype, torch.device("cpu"), num_states=6)
        pieces = [
            decoder.run_segment(whole, decoder.embed(tokens_T[a:b]), kv, batch_of([a], [b - a]))
            for a, b in zip([0, *cuts], [*cuts, 23], strict=True)
        ]
        return torch.cat(pieces)

    expected, threads = run([]), torch.get_num_threads()
    try:
        for cuts, count in (([1, 2, 17, 18], 1), ([16], 3)):
            torch.set_num_threads(count)
            assert torch.equal(run(cuts), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_stage_without_keys_and_values_runs_in_one_call(folder_of: Callable[[str], Path]) -> None:
    decoder = load_decoder(folder_of("granitemoehybrid"), dtype="bfloat16", backend="cpu")
    stack = build_stack(decoder.backend, decoder.spec, decoder.layers, range(1), ())
    x_TD, batch = decoder.embed(torch.arange(5)), batch_of([0, 0], [3, 2])
    caches = [
        allocate_layers(decoder.spec, 24, 4, decoder.kv_dtype, torch.device("cpu"), num_states=6) for _ in range(2)
    ]
    expected = one_by_one(decoder).run_segment(Segment(index=0, layers=range(1)), x_TD.clone(), caches[0], batch)
    found = stack.run(range(1), x_TD, caches[1][:1], decoder.distinct_tables, batch)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["qwen3_next", "granitemoehybrid"])
def test_an_engine_gives_the_answers_of_single_operations(folder_of: Callable[[str], Path], name: str) -> None:
    """Chunked, beside each other, with prefixes that go on from kept states, and by a budget of experts."""
    model = load_model(folder_of(name), dtype="bfloat16", device="cpu", progress=False)
    assert model.decoder.stack is not None
    plain = replace(model, decoder=one_by_one(model.decoder))
    prompts = random_prompts([70, 3, 33, 18], seed=1)
    prompts.append([*prompts[0][:66], 5])

    def found(of: LoadedModel) -> list[list[float]]:
        engine = Engine(of, EngineConfig(block_size=4, max_num_batched_tokens=24, max_num_seqs=3))
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
        logprobs = [answer.logprobs for _ in range(2) for answer in answers(engine, prompts, params)]
        assert engine.stats().prefix_cache_hits > 0
        few = replace(params, quality=None, experts_per_token=1)
        return logprobs + [answer.logprobs for answer in answers(engine, prompts, few)]

    assert found(model) == found(plain)


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3"])
def test_layers_between_exits_run_in_one_call_where_exits_cannot(name: str, tmp_path: Path) -> None:
    """Beside states, and in front of latents: what happens at exits is single operations then."""
    folder = {**MODELS, "deepseek_v3": LATENT["v3"]}[name].save(tmp_path)
    add_exits(folder, {1: 0.4, 2: 0.4})
    model = load_model(folder, dtype="bfloat16", device="cpu", progress=False)
    decoder, prompts = model.decoder, random_prompts([1, 7, 33, 12], seed=2)
    assert decoder.stack is not None
    assert decoder.stack.num_exits == 0
    with pytest.raises(NotStacked, match="exits in"):
        build_stack(decoder.backend, decoder.spec, decoder.layers, decoder.held, decoder.exits.values())
    params = SamplingParams(
        temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0, quality=None, exit_thresholds={1: 0.5, 2: 0.5}
    )

    def found(of: LoadedModel) -> list[tuple[list[float], list[int]]]:
        engine = Engine(of, EngineConfig(max_num_batched_tokens=24))
        made = [(answer.logprobs, answer.layers) for answer in answers(engine, prompts, params)]
        assert any(depth < decoder.spec.num_layers for _, layers in made for depth in layers), "no row exits"
        return made

    assert found(model) == found(replace(model, decoder=one_by_one(decoder)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv_WX": torch.zeros(1, 160)}, "conv_WX must have 2 … 64 taps of 160 channels"),
        ({"decay_rate_H": torch.zeros(3)}, "decay_rate_H must hold 4 elements"),
        ({"norm_V": torch.zeros(3)}, "norm_V must be contiguous with 24 entries"),
    ],
)
def test_layers_of_other_sizes_are_refused(
    folder_of: Callable[[str], Path], changed: dict[str, Any], message: str
) -> None:
    decoder = load_decoder(folder_of("qwen3_next"), dtype="float32", backend="cpu")
    first, *others = decoder.layers
    layers = [replace(first, attention=replace(first.attention, **changed)), *others]
    with pytest.raises(ValueError, match=message):
        build_stack(decoder.backend, decoder.spec, layers, decoder.held, ())


def test_states_that_are_not_the_models_are_refused(folder_of: Callable[[str], Path]) -> None:
    decoder = load_decoder(folder_of("qwen3_next"), dtype="float32", backend="cpu")
    kv = allocate_layers(decoder.spec, 24, 4, decoder.kv_dtype, torch.device("cpu"), num_states=6)
    whole, batch = Segment(index=0, layers=range(decoder.spec.num_layers)), batch_of([0, 0], [3, 2])
    x_TD = decoder.embed(torch.arange(5))

    def run(**changed: Any) -> torch.Tensor:
        return decoder.run_segment(whole, x_TD, kv, replace(batch, **changed))

    assert run().isfinite().all()
    with pytest.raises(ValueError, match="a slot of states for each of 2 sequences"):
        run(state_slots_S=None)
    with pytest.raises(IndexError, match="slot 6 is not in 0 … 5"):
        run(state_slots_S=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="slot 2 is written for two sequences"):
        run(kept_slots_S=torch.tensor([2, -1]))
    first = kv[0]
    for place, states in ((0, first.states[0][:, :2]), (1, first.states[1][:, :1])):
        others = list(first.states)
        others[place] = states.contiguous()
        kv = type(kv)([replace(first, states=tuple(others)), *kv[1:]])
        with pytest.raises(ValueError, match="do not fit the model"):
            run()
