"""Training: objectives, optimisers, and runs that are killed and go on."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.text.corpus import Windows
from dynamoe.dynamic.train import head_loss
from dynamoe.dynamic.train.command import TrainConfig
from dynamoe.dynamic.train.language_model import LanguageModelConfig, LanguageModelTask
from dynamoe.dynamic.train.model import DecoderConfig, TrainableDecoder
from dynamoe.dynamic.train.recipe_config import RecipeConfig
from dynamoe.exits.training.memory import MemoryEstimate, estimate_memory, refuse_if_too_large
from dynamoe.exits.training.objectives import ExitTraining, layer_dropout_rates, sequences_kept
from dynamoe.exits.training.optimizers import cosine_rate, make_optimizers, orthogonalize
from dynamoe.exits.training.progress import read_losses
from dynamoe.exits.training.trainer import TrainerConfig, check_memory, train
from dynamoe.moe.trainable_experts import load_balancing_loss
from forks import ForkedProcess, run_processes

SHAPE = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, expert_size=16,
    exit_layers=(1, 2), adapter_rank=4, max_position=64,
)  # fmt: skip
TEXT = LanguageModelConfig(batch_tokens=256, sequence_length=32, window=64, evaluation_tokens=256)


def make_task(steps: int, exits: ExitTraining | None = None) -> LanguageModelTask:
    """Text with a pattern that a small model can learn: every token follows from the one before."""
    generator = torch.Generator().manual_seed(1)
    successor = torch.randperm(64, generator=generator)
    stream = [0]
    for jump in (torch.rand(6000, generator=generator) < 0.2).tolist():
        stream.append(int(torch.randint(64, (1,), generator=generator)) if jump else int(successor[stream[-1]]))
    tokens = torch.tensor(stream, dtype=torch.int16)
    return LanguageModelTask(TEXT, exits or ExitTraining(), tokens[:5000], {"a/b": tokens[5000:]}, steps)


def test_balancing_loss_is_one_when_even_and_grows_when_not() -> None:
    even = load_balancing_loss(torch.full((8, 4), 0.25), torch.arange(8)[:, None] % 4)
    collapsed = load_balancing_loss(
        torch.eye(4)[torch.zeros(8, dtype=torch.int64)], torch.zeros(8, 1, dtype=torch.int64)
    )
    assert even.item() == pytest.approx(1.0)
    assert collapsed.item() == pytest.approx(4.0)


def test_balancing_loss_spreads_the_load() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    router = torch.randn(8, 4).mul_(0.3).requires_grad_()
    bias = torch.tensor([3.0, 0, 0, 0], requires_grad=True)
    optimizer = torch.optim.Adam([router, bias], lr=0.05)

    def busiest() -> float:
        return torch.bincount((x @ router + bias).argmax(-1), minlength=4).max().item() / 256

    before = busiest()
    for _ in range(100):
        logits = x @ router + bias
        optimizer.zero_grad()
        load_balancing_loss(logits.softmax(-1), logits.topk(1).indices).backward()
        optimizer.step()
    assert before > 0.8
    assert busiest() < 0.45


def test_layer_dropout_rises_with_depth_and_spares_the_first_layer() -> None:
    rates = layer_dropout_rates(16, 0.2)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)
    kept = sequences_kept(rates, 4000, torch.Generator().manual_seed(0))
    assert kept[0] is None
    assert kept[-1] is not None
    assert kept[-1].numel() / 4000 == pytest.approx(0.8, abs=0.03)


def test_a_dropped_sequence_skips_the_layer_and_the_others_do_not_notice() -> None:
    model = TrainableDecoder(SHAPE, seed=3)
    tokens = torch.randint(64, (3, 16))
    kept = [None, torch.tensor([0, 2]), None, torch.tensor([], dtype=torch.int64)]
    mixed = model(tokens, kept).final_NLD
    for sequence, absent in ((0, {3}), (1, {1, 3}), (2, {3})):
        alone = [torch.tensor([], dtype=torch.int64) if layer in absent else None for layer in range(4)]
        torch.testing.assert_close(mixed[sequence], model(tokens[sequence : sequence + 1], alone).final_NLD[0])


def test_layers_that_are_added_later_change_nothing_until_they_are_trained() -> None:
    task = make_task(10)
    task.config = replace(TEXT, grow_from=2, grow_at=0.5)
    model = TrainableDecoder(SHAPE, seed=3)
    model.zero_outputs(2)
    tokens = torch.randint(64, (3, 16))
    whole = model(tokens)
    torch.testing.assert_close(whole.final_NLD, whole.exits[2], rtol=0, atol=0)

    def trained(step: int) -> set[int]:
        model.zero_grad(set_to_none=True)
        loss, values = task.loss(model, step)
        loss.backward()
        assert "exit_2" not in values or step >= 5  # the last of the first layers is no exit of its own yet
        return {n for n, layer in enumerate(model.layers) if any(p.grad is not None for p in layer.parameters())}

    assert [trained(step) for step in (0, 4)] == [{0, 1}, {0, 1}]
    assert trained(9) == {0, 1, 2, 3}


@pytest.mark.parametrize(("change", "message"), [({"grow_from": -1}, "grow_from"), ({"grow_at": 1.0}, "grow_at")])
def test_a_growth_that_cannot_be_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TEXT, **change)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gradients_in_bfloat16_are_those_in_float32_roughly(weights: torch.dtype) -> None:
    found = []
    for activations, stored in ((torch.float32, torch.float32), (torch.bfloat16, weights)):
        model = TrainableDecoder(SHAPE, dtype=activations, seed=1).to(stored)
        make_task(6).loss(model, 4)[0].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert {g.dtype for g in grads} == {stored}
        found.append(torch.cat([g.float().flatten() for g in grads]))
    # Rounding flips near-ties of the routers, which moves a few tokens to other experts: about 0.1.
    assert (found[1] - found[0]).norm() < 0.2 * found[0].norm()


def exit_loss(
    exit_logits_TV: torch.Tensor, final_logits_TV: torch.Tensor, targets_T: torch.Tensor, distillation: float
) -> torch.Tensor:
    """The oracle: cross-entropy against the true tokens, mixed with that against the full model's distribution."""
    log_probs_TV = exit_logits_TV.log_softmax(-1)
    teacher_TV = final_logits_TV.detach().softmax(-1)
    label_only = torch.nn.functional.nll_loss(log_probs_TV, targets_T)
    return (1 - distillation) * label_only - distillation * (teacher_TV * log_probs_TV).sum(-1).mean()


def test_exit_loss_is_smallest_for_the_teacher_itself_and_does_not_pull_on_it() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(20, 10, requires_grad=True)
    student = torch.randn(20, 10, requires_grad=True)
    targets = torch.randint(10, (20,))
    same = exit_loss(teacher.detach(), teacher, targets, 1.0)
    other = exit_loss(student, teacher, targets, 1.0)
    other.backward()
    assert same < other
    assert teacher.grad is None
    assert student.grad is not None
    label_only = exit_loss(student, teacher, targets, 0.0)
    torch.testing.assert_close(label_only, torch.nn.functional.cross_entropy(student, targets))


@pytest.mark.parametrize("distillation", [0.0, 0.5, 1.0])
def test_head_losses_and_their_gradients_match_the_oracle(distillation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_BLOCK_LOGITS", 7 * 30)  # a ragged last block
    torch.manual_seed(0)
    final, at_exit = (torch.randn(20, 12, requires_grad=True) for _ in range(2))
    weight, targets = torch.randn(30, 12, requires_grad=True), torch.randint(30, (20,))
    logits = final @ weight.t()
    oracle = (
        torch.nn.functional.cross_entropy(logits, targets),
        exit_loss(at_exit @ weight.t(), logits, targets, distillation),
    )
    results = []
    for losses in (oracle, head_loss.head_losses(final, at_exit, weight, targets, distillation)):
        grads = torch.autograd.grad(losses[0] + 0.3 * losses[1], (final, at_exit, weight))
        results.append((*losses, *grads))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    alone, none = head_loss.head_losses(final, None, weight, targets, distillation)
    assert none is None
    torch.testing.assert_close(alone, results[0][0])
    theirs = torch.autograd.grad(torch.nn.functional.cross_entropy(final @ weight.t(), targets), (final, weight))
    torch.testing.assert_close(torch.autograd.grad(alone, (final, weight)), theirs, rtol=1e-4, atol=1e-5)


def test_exits_take_turns_and_their_weight_ramps_up() -> None:
    exits = ExitTraining(ramp=0.5)
    assert [exits.exit_of_step(step, (4, 8, 12)) for step in range(4)] == [4, 8, 12, 4]
    assert exits.strength(0, 100) == 0
    assert exits.strength(25, 100) == 0.5
    assert exits.strength(80, 100) == 1
    late = ExitTraining(start=0.5, ramp=0.2)
    assert [late.strength(step, 100) for step in (0, 50, 60, 90)] == [0, 0, 0.5, 1]
    assert ExitTraining(loss_weight=0).exit_of_step(0, (4,)) is None


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (2, 20, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_every_parameter_is_optimised_exactly_once() -> None:
    model = TrainableDecoder(SHAPE)
    for name in ("adamw", "muon"):
        groups = [g for o in make_optimizers(model, name, 1e-3, 0.1) for g in o.param_groups]
        held = [id(p) for g in groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
    with pytest.raises(ValueError, match="'sgd'"):
        make_optimizers(model, "sgd", 1e-3, 0.1)


def test_cosine_rate() -> None:
    assert cosine_rate(0, 100, 10, 0.1) == pytest.approx(0.1)
    assert cosine_rate(10, 100, 10, 0.1) == pytest.approx(1.0)
    assert cosine_rate(100, 100, 10, 0.1) == pytest.approx(0.1)


def test_windows_cover_an_epoch_once_whatever_the_length() -> None:
    stream = torch.arange(1025, dtype=torch.int16)
    windows = Windows(stream, batch_tokens=256, window=64, seed=5)
    epoch = torch.cat([windows.batch(step, 32)[0].flatten() for step in range(4)])
    assert sorted(epoch.tolist()) == list(range(1024))
    torch.testing.assert_close(windows.batch(1, 64)[0].flatten(), windows.batch(1, 16)[0].flatten())
    inputs, targets = windows.batch(6, 32)
    torch.testing.assert_close(inputs + 1, targets)
    second = torch.cat([windows.batch(step, 32)[0].flatten() for step in range(4, 8)])
    assert not torch.equal(epoch, second)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_learns_the_pattern_and_the_exits_follow(optimizer: str, tmp_path: Path) -> None:
    config = TrainerConfig(steps=60, learning_rate=1e-2, warmup_steps=5, optimizer=optimizer, log_every=1)
    model = TrainableDecoder(SHAPE)
    result = train(model, make_task(60), config, tmp_path, progress=False)
    losses = [r["cross_entropy"] for r in read_losses(tmp_path / "metrics.jsonl") if "cross_entropy" in r]
    assert result.finished
    assert losses[0] > 4.0
    assert losses[-1] < 2.6  # a unigram guess is 4.16, the pattern's own entropy about 1.3
    assert result.evaluation["perplexity"] < 15
    assert result.evaluation["agreement/exit_2"] > 0.5


def test_pieces_give_the_same_curve_as_one_run(tmp_path: Path) -> None:
    config = TrainerConfig(steps=12, warmup_steps=2, log_every=1)
    train(TrainableDecoder(SHAPE), make_task(12), config, tmp_path / "whole", progress=False)
    calls = 0
    while True:  # every call stops after its first step
        piece = replace(config, max_minutes=1e-9)
        calls += 1
        if train(TrainableDecoder(SHAPE), make_task(12), piece, tmp_path / "pieces", progress=False).finished:
            break
    assert calls == 12
    whole, pieces = (read_losses(tmp_path / name / "metrics.jsonl") for name in ("whole", "pieces"))
    assert whole == pieces


def test_the_longest_time_of_a_recipe_counts_unless_the_command_gives_one() -> None:
    recipe = RecipeConfig(trainer=TrainerConfig(steps=4, max_minutes=3))
    assert TrainConfig(recipe=recipe).recipe.trainer.max_minutes == 3
    assert TrainConfig(recipe=recipe, max_minutes=5).recipe.trainer.max_minutes == 5


KILLED_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("test_training", {file!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
tests.torch.set_num_threads(1)
config = tests.TrainerConfig(steps=40, warmup_steps=2, log_every=1, checkpoint_minutes=0.0)
tests.train(tests.TrainableDecoder(tests.SHAPE), tests.make_task(40), config, Path(sys.argv[1]), progress=False)
"""


def test_a_killed_run_goes_on_with_the_same_curve(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(KILLED_RUN.format(tests=str(Path(__file__).parent), file=__file__))
    command = [str(script), str(tmp_path / "killed")]
    process = ForkedProcess(command, tmp_path / "output", tmp_path)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= len(metrics.read_text().splitlines()) < 40
    for name in ("killed", "whole"):
        code, output = run_processes([str(script), str(tmp_path / name)], 1, tmp_path)
        assert code == 0, output
    resumed, whole = (read_losses(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole"))
    assert [r["step"] for r in whole] == [*range(1, 41), 40]
    assert resumed == whole


def test_a_half_written_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    config = TrainerConfig(steps=4, log_every=1, max_minutes=1e-9)
    train(TrainableDecoder(SHAPE), make_task(4), config, tmp_path, progress=False)
    partial = tmp_path / "step-00000003.partial"
    partial.mkdir()
    (partial / "state.json").write_text('{"step": 3')
    assert train(TrainableDecoder(SHAPE), make_task(4), config, tmp_path, progress=False).step == 2


def test_other_settings_are_refused_in_the_same_directory(tmp_path: Path) -> None:
    config = TrainerConfig(steps=4, max_minutes=1e-9)
    train(TrainableDecoder(SHAPE), make_task(4), config, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"learning_rate=0\.5 \(was 0\.003\)"):
        train(TrainableDecoder(SHAPE), make_task(4), replace(config, learning_rate=0.5), tmp_path, progress=False)
    with pytest.raises(ValueError, match="does not fit this model"):
        train(TrainableDecoder(replace(SHAPE, num_layers=5)), make_task(4), config, tmp_path, progress=False)


def test_memory_estimate_counts_what_the_backward_pass_keeps() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8)
    estimate = estimate_memory(layer, lambda: layer(x).square().sum(), samples_per_step=3)
    assert estimate.weights == estimate.gradients == 8 * 4 * 4
    assert estimate.optimizer == 2 * estimate.weights
    assert estimate.activations == round((16 * 8 + 16 * 4) * 4 * 3 * 1.3)


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    huge = replace(TEXT, batch_tokens=2**40)
    task = make_task(4)
    task.samples_per_step = huge.batch_tokens // huge.window
    with pytest.raises(ValueError, match=r"needs about .* GiB are free; take a smaller batch"):
        train(TrainableDecoder(SHAPE), task, TrainerConfig(steps=4), tmp_path, progress=False)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert "GiB" in check_memory(TrainableDecoder(SHAPE), make_task(4), TrainerConfig(steps=4))
    refuse_if_too_large(MemoryEstimate(weights=1, gradients=1, optimizer=1, activations=1), 4)


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainerConfig(steps=3, log_every=1, tensorboard=True)
    train(TrainableDecoder(SHAPE), make_task(3), config, tmp_path, progress=False)
    accumulator = events.EventAccumulator(str(tmp_path)).Reload()
    recorded = [round(e.value, 4) for e in accumulator.Scalars("loss")]
    logged = [r["loss"] for r in read_losses(tmp_path / "metrics.jsonl") if "loss" in r]
    assert recorded == [round(v, 4) for v in logged]


def test_config_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"exit_layers must rise within 1…15, not \(4, 16\)"):
        DecoderConfig(exit_layers=(4, 16))
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        TrainerConfig(steps=0)
    with pytest.raises(ValueError, match="layer_dropout must be at least 0 and below 1, not 1"):
        ExitTraining(layer_dropout=1)


def test_run_json_is_readable(tmp_path: Path) -> None:
    train(TrainableDecoder(SHAPE), make_task(1), TrainerConfig(steps=1), tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["optimizer"] == "muon"
