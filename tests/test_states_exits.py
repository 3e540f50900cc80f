"""Exits in models with recurrent states: rows that exit advance the states of the layers that they skip."""

from __future__ import annotations

import shutil
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
from dynamoe.dynamic.model.attention.states import StateSpec
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import bytes_per_page, bytes_per_sequence
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.train.expert_scales import ExpertsConfig, make_expert_scales
from dynamoe.dynamic.train.frozen import FrozenConfig, make_frozen_exits
from dynamoe.exits.segments import Segment
from dynamoe.exits.training.exit_heads import ExitHeadsConfig
from dynamoe.exits.training.heads import HeadTraining
from dynamoe.kernels.api.types import AttentionBatch
from engine_answers import Answer, answers
from test_decoder import random_prompts
from test_families_parity_nemotron import VARIANTS as OTHERS
from test_families_parity_states import VARIANTS

EXITS = {1: 0.4, 2: 0.4}
TOKENS = 16
EARLY = SamplingParams(
    temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, quality=None, exit_thresholds={1: 0.5, 2: 0.5}
)
PROMPTS = random_prompts([1, 7, 33, 12, 20, 5], seed=2)

# Gated DeltaNet and Mamba2, whose full layers have output gates or none.
MODELS = [*VARIANTS[1:3], *(pytest.param(v, marks=pytest.mark.slow) for v in (VARIANTS[0], VARIANTS[3], *OTHERS))]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = request.param.save(tmp_path_factory.mktemp("exits"))
    add_exits(directory, EXITS)
    return load_model(directory, dtype="float32", device="cpu", progress=False)


def serve(engine: Engine, prompts: list[list[int]], params: SamplingParams = EARLY) -> list[Answer]:
    return answers(engine, prompts, params)


def small_engine(model: LoadedModel, pages: int, **settings: Any) -> Engine:
    """With few pages of 8 tokens."""
    page, states = bytes_per_page(model.spec, torch.float32, 8), 4 * bytes_per_sequence(model.spec)
    return Engine(model, EngineConfig(block_size=8, max_num_seqs=4, kv_memory=pages * page + states, **settings))


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> list[Answer]:
    """What every prompt gives when nobody is beside it."""
    return [serve(Engine(model), [prompt])[0] for prompt in PROMPTS]


def rows_of(first: int, count: int) -> AttentionBatch:
    """Rows of the only sequence, whose pages are in order."""
    return AttentionBatch(
        positions_T=torch.arange(first, first + count),
        slots_T=torch.arange(first, first + count),
        query_start_S1=torch.tensor([0, count], dtype=torch.int32),
        context_len_S=torch.tensor([first + count], dtype=torch.int32),
        block_table_SM=torch.arange(8, dtype=torch.int32)[None],
        max_query_len=count,
        max_context_len=first + count,
        state_slots_S=torch.tensor([0]),
    )


@torch.inference_mode()
def by_hand(decoder: Decoder, prompt: list[int], tokens: list[int], depths: list[int]) -> list[float]:
    """Logprobs of tokens: each position goes through all layers, but its stream stays as it is behind its exit."""
    kv, found = decoder.allocate_cache(8, 16), []
    inputs = [prompt, *([token] for token in tokens[:-1])]
    first = 0
    for ids, token, depth in zip(inputs, tokens, depths, strict=True):
        x_TD, batch = decoder.embed(torch.tensor(ids)), rows_of(first, len(ids))
        for number in range(decoder.spec.num_layers):
            through_TD = decoder.run_segment(
                Segment(index=0, layers=range(number, number + 1)), x_TD.clone(), kv, batch
            )
            x_TD = through_TD if number < depth else x_TD
        last_1D = x_TD[-1:]
        if depth < decoder.spec.num_layers:
            last_1D = decoder.apply_exit_head(decoder.exits[depth], last_1D)
        found.append(float(decoder.logits(last_1D)[0].log_softmax(-1)[token]))
        first += len(ids)
    return found


def test_layers_behind_an_exit_go_on_from_the_stream_there(model: LoadedModel, alone: list[Answer]) -> None:
    layers = [depth for _, depths, _ in alone for depth in depths]
    assert {1, 2, model.spec.num_layers} == set(layers)
    for prompt, (tokens, depths, logprobs) in zip(PROMPTS, alone, strict=True):
        expected = by_hand(model.decoder, prompt, tokens, depths)
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_states_matter_to_rows_behind_one_that_exits(
    model: LoadedModel, alone: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateSpec, "propagate", lambda *_: None)
    assert serve(Engine(model), PROMPTS) != alone


def test_neighbours_chunks_and_preemption_change_no_bit(model: LoadedModel, alone: list[Answer]) -> None:
    assert serve(Engine(model), PROMPTS) == alone
    assert serve(Engine(model, EngineConfig(max_num_batched_tokens=5, max_num_seqs=3)), PROMPTS) == alone
    engine = small_engine(model, 12, max_num_batched_tokens=64)
    assert serve(engine, PROMPTS) == alone
    assert engine.stats().preemptions > 0


def test_budgets_of_experts_beside_exits(model: LoadedModel, alone: list[Answer]) -> None:
    both = replace(EARLY, experts_per_token=1)
    if all(layer.moe is None for layer in model.spec.layers):
        with pytest.raises(ValueError, match="an expert budget needs experts"):
            serve(Engine(model), PROMPTS, both)
        return
    together = serve(Engine(model), PROMPTS, both)
    assert together == [serve(Engine(model), [prompt], both)[0] for prompt in PROMPTS]
    assert together != alone
    engine = small_engine(model, 12, max_num_batched_tokens=64)
    assert serve(engine, PROMPTS, both) == together
    assert engine.stats().preemptions > 0


def test_rows_of_a_sequence_that_exits_do_not_pass_each_other(model: LoadedModel) -> None:
    """Computed again, positions run together where they exit together, and never beside those that do not."""
    engine = small_engine(model, 12, max_num_batched_tokens=64)
    steps: list[list[int]] = []
    schedule = engine.scheduler.schedule

    def watched() -> Any:
        found = schedule()
        for entry in found.entries:
            sequence, behind = entry.sequence, entry.start - entry.sequence.num_prompt
            if behind >= 0 and behind < len(sequence.depths):
                steps.append(list(sequence.depths[behind : behind + entry.count]))
                assert len(steps[-1]) == entry.count
            else:
                assert behind < 0 or entry.count == 1
                assert behind >= 0 or behind + entry.count <= 0
        return found

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    serve(engine, PROMPTS)
    assert any(len(depths) > 1 for depths in steps)
    assert all(len(set(depths)) == 1 for depths in steps)


def test_probes_and_contributions_are_made_for_such_models(tmp_path: Path, texts: Path) -> None:
    source = VARIANTS[2].save(tmp_path / "source")
    training = HeadTraining(steps=20, batch_rows=64, learning_rate=1e-2)
    config = FrozenConfig(
        model=str(source),
        output=str(tmp_path / "run"),
        text_folder=str(texts),
        exit_layers=(1, 3),
        adapter_rank=4,
        served_prompts=8,
        prompt_tokens=8,
        new_tokens=8,
        exit_rows=1200,
        heads=ExitHeadsConfig(training=training),
    )
    target = make_frozen_exits(config, progress=False, say=lambda _: None)
    copied = Path(shutil.copytree(target, tmp_path / "copied"))
    experts = ExpertsConfig(model=str(copied), windows=4, window_tokens=32, text_folder=str(texts), dtype="float32")
    scales = make_expert_scales(experts, progress=False, say=lambda _: None)
    assert all(layer is not None for layer in scales.layers)
    model = load_model(copied, dtype="float32", device="cpu", progress=False)
    params = replace(EARLY, exit_thresholds={1: 0.0, 3: 1.0}, expert_keep=0.5)
    engine = Engine(model)
    served = serve(engine, PROMPTS, params)
    assert all(depths == [4, *[1] * (TOKENS - 1)] for _, depths, _ in served)
    assert engine.stats().skipped_experts > 0
    assert serve(engine, PROMPTS, params) == served
