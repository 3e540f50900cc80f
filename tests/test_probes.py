"""Probes and exit-head adapters on frozen states, what they may cost, and the sidecar that carries them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.train.exit_states import collect_states, trained_backbone
from dynamoe.dynamic.train.export import export_checkpoint
from dynamoe.dynamic.train.model import DecoderConfig, TrainableDecoder
from dynamoe.exits.calibrators import Isotonic, Temperature, fit_isotonic, fit_temperature, logit_threshold
from dynamoe.exits.exit_head import ExitHeadAdapter
from dynamoe.exits.metrics import aurc
from dynamoe.exits.probes import (
    Probe,
    ProbeSpec,
    check_probe_cost,
    frequent_tokens,
    saturation,
    top_margin,
)
from dynamoe.exits.sidecar import ExitHeads, backbone_hash, load_heads, save_heads
from dynamoe.exits.training.exit_heads import ExitHeadsConfig, compared_probes, make_exits
from dynamoe.exits.training.heads import (
    ExitStates,
    HeadTraining,
    choices,
    exit_labels,
    fit_adapter,
    fit_probe,
    probe_logits,
)
from safetensors.torch import load_file, save_file

HIDDEN, VOCABULARY = 32, 50
SPECS = compared_probes(DecoderConfig().hidden_size, DecoderConfig().layer_flops)
QUICK = HeadTraining(steps=200, batch_rows=256, learning_rate=1e-2)


def make_states(change_size: float) -> ExitStates:
    """Rows whose final state is a linear map of the early one, plus noise on the half that a direction marks."""
    generator = torch.Generator().manual_seed(0)
    early = torch.randn(4000, HIDDEN, generator=generator)
    hard = (early[:, 0] + 0.5 * early[:, 1] > 0).float()[:, None]
    change = torch.eye(HIDDEN) + change_size * torch.randn(HIDDEN, 4, generator=generator) @ torch.randn(
        4, HIDDEN, generator=generator
    ) / (HIDDEN**0.5)
    final = early @ change.T + 3 * hard * torch.randn(4000, HIDDEN, generator=generator)
    return ExitStates(
        hidden_RD={0: torch.randn(4000, HIDDEN, generator=generator), 2: early},
        router_entropy_R={2: torch.rand(4000, generator=generator)},
        final_RD=final,
        group_R=torch.arange(4000) // 20,
    )


@pytest.fixture(scope="module")
def states() -> ExitStates:
    return make_states(0.6)


def head(x_RD: torch.Tensor) -> torch.Tensor:
    """A fixed final norm and LM head."""
    weight_VD = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(9))
    return x_RD @ weight_VD.T


def test_a_new_adapter_is_the_identity_and_training_raises_agreement(states: ExitStates) -> None:
    adapter = ExitHeadAdapter(HIDDEN, 8)
    torch.testing.assert_close(adapter(states.final_RD), states.final_RD)
    before = exit_labels(adapter, 2, states, head, choices(states.final_RD, head)).mean()
    fit_adapter(adapter, 2, states, head, QUICK)
    after = exit_labels(adapter, 2, states, head, choices(states.final_RD, head)).mean()
    assert after > before + 0.05
    with pytest.raises(ValueError, match="not 33"):
        ExitHeadAdapter(HIDDEN, 33)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_kind_finds_the_direction_that_decides(spec: ProbeSpec) -> None:
    train, test = make_states(0.0).split((0.7, 0.3))
    labels = [
        exit_labels(ExitHeadAdapter(HIDDEN, 8), 2, part, head, choices(part.final_RD, head)) for part in (train, test)
    ]
    probe = fit_probe(spec, 2, train, labels[0], QUICK)
    with torch.no_grad():
        found = aurc(probe_logits(probe, 2, test), labels[1])
    assert found < 0.8 * aurc(torch.rand(labels[1].numel()), labels[1])


def test_splits_never_divide_a_group(states: ExitStates) -> None:
    parts = states.split((0.6, 0.2, 0.2))
    groups = [set(part.group_R.tolist()) for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 200
    assert [len(g) for g in groups] == [120, 40, 40]
    with pytest.raises(ValueError, match="1 documents cannot be split into 2 parts"):
        states.take(torch.arange(5)).split((0.5, 0.5))


def test_a_probe_costs_at_most_one_percent_of_a_layer() -> None:
    tiny = DecoderConfig()
    for spec in SPECS.values():
        assert check_probe_cost(spec, tiny.hidden_size, tiny.layer_flops) <= 0.01
    with pytest.raises(ValueError, match=r"mlp probe of width 64 on hidden size 192 costs .*at most 1%"):
        check_probe_cost(ProbeSpec(kind="mlp", width=64), tiny.hidden_size, tiny.layer_flops)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_counted_flops_cover_the_products_that_run(spec: ProbeSpec) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    probe = Probe(spec, HIDDEN)
    rows = torch.randn(10, HIDDEN)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        probe(rows, rows if spec.previous else None, torch.rand(10) if spec.router_entropy else None)
    assert 0 < counter.get_total_flops() <= 10 * spec.flops_per_row(HIDDEN)


def test_a_probe_ignores_the_size_of_the_residual() -> None:
    probe, rows = Probe(ProbeSpec(kind="mlp"), HIDDEN), torch.randn(10, HIDDEN)
    torch.testing.assert_close(probe(rows * 100), probe(rows), rtol=1e-4, atol=1e-4)


def test_baselines() -> None:
    logits = torch.tensor([[10.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    margin = top_margin(logits)
    assert margin[0] > 0.99
    assert margin[1] == 0
    same = saturation(torch.ones(1, 4), 3 * torch.ones(1, 4))
    assert same.item() == pytest.approx(1)
    assert frequent_tokens(torch.tensor([5, 2, 2, 5, 5, 1], dtype=torch.int16), 2).tolist() == [5, 2]


def test_the_sidecar_returns_what_was_saved_and_notices_other_weights(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert load_heads(tmp_path) is None
    heads = ExitHeads(
        hidden_size=HIDDEN,
        adapters={4: ExitHeadAdapter(HIDDEN, 2), 8: ExitHeadAdapter(HIDDEN, 2)},
        probes={4: Probe(ProbeSpec(), HIDDEN), 8: Probe(ProbeSpec(kind="mlp", width=3, previous=True), HIDDEN)},
        calibrators={4: Temperature(0.5), 8: Isotonic((0.0,), (0.9,))},
        backbone_sha256=backbone_hash(tmp_path),
        metrics={"a": 1},
    )
    save_heads(heads, tmp_path)
    again = load_heads(tmp_path)
    assert again is not None
    assert again.exit_layers == (4, 8)
    assert again.calibrators == heads.calibrators
    assert again.metrics == {"a": 1}
    rows = torch.randn(5, HIDDEN)
    torch.testing.assert_close(again.probes[8](rows, rows), heads.probes[8](rows, rows))
    torch.testing.assert_close(again.adapters[4](rows), heads.adapters[4](rows))
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="was trained on other weights"):
        load_heads(tmp_path)


SHAPE = DecoderConfig(
    vocab_size=300, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=4,
    expert_size=64, exit_layers=(1, 3), adapter_rank=4, max_position=128,
)  # fmt: skip


def write_tokenizer(path: Path) -> Path:
    from dynamoe.dynamic.text.corpus import train_tokenizer

    train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 4] * 20, SHAPE.vocab_size).save(str(path))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainableDecoder, Path]:
    """A random model whose depth matters, and its export in float32."""
    folder = tmp_path_factory.mktemp("export")
    model = TrainableDecoder(SHAPE, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
            elif name == "embedding":
                parameter.mul_(5)
    target = folder / "model"
    export_checkpoint(model, write_tokenizer(folder / "tokenizer.json"), target, torch.float32)
    return model, target


def test_an_export_removes_what_belongs_to_an_earlier_one(
    exported: tuple[TrainableDecoder, Path], tmp_path: Path
) -> None:
    model, target = exported
    sidecars = ("exits.json", "exits.safetensors", "experts.json")
    for name in sidecars:
        (tmp_path / name).touch()
    export_checkpoint(model, target / "tokenizer.json", tmp_path, torch.float32)
    assert not any((tmp_path / name).exists() for name in sidecars)


def test_the_export_is_read_by_transformers(exported: tuple[TrainableDecoder, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, target = exported
    tokens = torch.randint(SHAPE.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model(tokens).final_NLD)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-3, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.decode(tokenizer("the lazy dog").input_ids) == "the lazy dog"


def test_the_export_is_read_by_this_framework(exported: tuple[TrainableDecoder, Path]) -> None:
    from dynamoe.dynamic.engine.sampling_params import SamplingParams
    from dynamoe.dynamic.llm import LLM

    model, target = exported
    llm = LLM(target, progress=False, backend="torch", max_num_seqs=2)
    prompt = [5, 9, 200, 31]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    output = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    tokens = torch.tensor([[*prompt, *output.token_ids]])
    with torch.no_grad():
        logits = model.logits(model(tokens).final_NLD)[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(output.token_ids)
    assert output.logprobs is not None
    chosen = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
    expected = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(chosen), expected, rtol=1e-3, atol=1e-3)


def test_exits_of_a_decoder_from_states_to_sidecar(exported: tuple[TrainableDecoder, Path], tmp_path: Path) -> None:
    model, target = exported
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(SHAPE.vocab_size, (1, 80), generator=generator) for _ in range(60)]
    states = collect_states(model, [(number, text, 10) for number, text in enumerate(texts)])
    assert states.final_RD.shape == (60 * 70, SHAPE.hidden_size)
    assert states.exit_layers == (1, 3)
    torch.testing.assert_close(states.previous(1), torch.cat([model.embedding[t[0, 10:]] for t in texts]).detach())
    torch.testing.assert_close(trained_backbone(model).logits(states.final_RD[:7]), model.logits(states.final_RD[:7]))
    assert states.router_entropy_R[3].max() <= torch.log(torch.tensor(4.0)) + 1e-5
    config = ExitHeadsConfig(training=replace(QUICK, steps=60), calibrator="temperature")
    heads, table = make_exits(trained_backbone(model), states, target, config, stream=texts[0][0])
    assert table.count("\n") == 1 + 2 * (len(SPECS) + 2)
    loaded = load_heads(target)
    assert loaded is not None
    assert loaded.probes[3].spec == heads.probes[3].spec
    assert loaded.metrics["at_2_percent_disagreement"]["disagreement"] <= 0.02
    assert "exits.1.adapter.down_JD" in load_file(target / "exits.safetensors")
    with pytest.raises(ValueError, match="'guess'"):
        ExitHeadsConfig(probe="guess")


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_a_logit_reaches_the_threshold_exactly_where_its_probability_does(kind: str) -> None:
    logits = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3
    correct = (torch.rand(4000, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(logits)).float()
    calibrator = {"temperature": fit_temperature, "isotonic": fit_isotonic}[kind](logits, correct)
    probabilities = calibrator(logits)
    for wanted in (0.0, 0.1, 0.5, float(probabilities[7]), 0.9, 0.999, 1.0):
        limit = logit_threshold(calibrator, wanted)
        assert torch.equal(logits >= limit, probabilities >= torch.tensor(wanted))
    assert logit_threshold(calibrator, 0.0) == float("-inf")
    never = Isotonic((-1.0, 2.0), (0.25, 0.75))
    assert [logit_threshold(never, p) for p in (0.2, 0.7, 0.8)] == [float("-inf"), 2.0, float("inf")]


def test_a_damaged_sidecar_is_named(tmp_path: Path) -> None:
    (tmp_path / "exits.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"exits.json or exits.safetensors beside it is damaged: KeyError"):
        load_heads(tmp_path)
    (tmp_path / "exits.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_heads(tmp_path)
