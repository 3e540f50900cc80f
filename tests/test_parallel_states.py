"""Models with recurrent states over several processes: real ones, compared with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import COMMON, add_exits
from dynamoe.dynamic.model.families import model_spec
from family_parity import Variant
from parallel_jobs import compare, shard_of
from test_families_parity_nemotron import JAMBA, KIMI, NEMOTRON
from test_families_parity_states import GRANITE, LFM2_MOE, LINEAR, NEXT, VARIANTS

NEXT_VARIANT, QWEN_3_5, GRANITE_VARIANT, LFM2 = VARIANTS
KIMI_VARIANT = Variant(family="kimi_linear", config=KIMI)
JAMBA_VARIANT = Variant(family="jamba", config={**JAMBA, "mamba_proj_bias": True})
ONE_BLOCK = Variant(family="nemotron_h", config={**NEMOTRON, "mlp_bias": True})
EARLY: dict[str, Any] = {"thresholds": {"1": 0.5, "2": 0.5}, "budget": {"experts_per_token": 1}}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        (GRANITE_VARIANT, {"tensor": 2}),  # all heads are one group, whose norm both ranks have parts of
        (QWEN_3_5, {"expert": 2}),
        (JAMBA_VARIANT, {"tensor": 2}),  # the time steps are made of all channels
        (ONE_BLOCK, {"expert": 2}),  # of latents
        pytest.param(ONE_BLOCK, {"tensor": 2}, marks=slow),
        pytest.param(ONE_BLOCK, {"tensor": 2, "expert": 2}, marks=slow),
        pytest.param(ONE_BLOCK, {"pipeline": 2}, marks=slow),
        pytest.param(ONE_BLOCK, {"data": 2}, marks=slow),
        pytest.param(KIMI_VARIANT, {"tensor": 2}, marks=slow),  # two heads and one
        pytest.param(KIMI_VARIANT, {"tensor": 3}, marks=slow),
        pytest.param(JAMBA_VARIANT, {"tensor": 2, "pipeline": 2}, marks=slow),
        pytest.param(QWEN_3_5, {"tensor": 2}, marks=slow),
        pytest.param(QWEN_3_5, {"tensor": 4}, marks=slow),  # two ranks for each group of heads
        pytest.param(NEXT_VARIANT, {"tensor": 2}, marks=slow),
        pytest.param(NEXT_VARIANT, {"tensor": 4}, marks=slow),
        pytest.param(GRANITE_VARIANT, {"expert": 2}, marks=slow),
        pytest.param(GRANITE_VARIANT, {"tensor": 2, "expert": 2}, marks=slow),
        pytest.param(GRANITE_VARIANT, {"data": 2}, marks=slow),
        pytest.param(GRANITE_VARIANT, {"pipeline": 2}, marks=slow),
        pytest.param(GRANITE_VARIANT, {"pipeline": 3}, marks=slow),
        pytest.param(LFM2, {"tensor": 2}, marks=slow),
        pytest.param(LFM2, {"pipeline": 2}, marks=slow),
        pytest.param(
            Variant(family="granitemoehybrid", config={**GRANITE, "mamba_n_groups": 2, "mamba_proj_bias": True}),
            {"tensor": 2},
            marks=slow,
        ),
        pytest.param(
            Variant(family="granitemoehybrid", config={**GRANITE, "mamba_n_groups": 2}), {"tensor": 4}, marks=slow
        ),
        pytest.param(Variant(family="lfm2_moe", config={**LFM2_MOE, "conv_bias": True}), {"tensor": 2}, marks=slow),
    ],
    ids=str,
)
def test_tokens_are_those_of_one_process(variant: Variant, sizes: dict[str, int], tmp_path: Path) -> None:
    directory = variant.save(tmp_path / "model")
    add_exits(directory, {1: 0.3, 2: 0.3})
    found = compare(tmp_path, str(directory), sizes, **EARLY)
    assert found["rows"][0] > found["rows"][-1], "no row exits"


@slow
@pytest.mark.parametrize("variant", [QWEN_3_5, GRANITE_VARIANT, KIMI_VARIANT, JAMBA_VARIANT, ONE_BLOCK], ids=str)
def test_quantised_weights_are_shared_out(variant: Variant, tmp_path: Path) -> None:
    compare(tmp_path, str(variant.save(tmp_path / "model")), {"tensor": 2}, {"quantization": "int8"})


def test_what_cannot_be_shared_out_is_refused() -> None:
    for family, config, parts in (
        ("qwen3_next", {**NEXT, "linear_num_value_heads": 2}, 4),
        ("qwen3_5", {**LINEAR, "linear_num_key_heads": 3, "linear_num_value_heads": 6}, 4),
    ):
        keys = {**COMMON, "model_type": family, "num_key_value_heads": 4, "full_attention_interval": 2}
        spec = model_spec({**keys, **config})
        with pytest.raises(ValueError, match=f"parallel.tensor={parts} does not go with"):
            shard_of(spec, parts, 1, 0)
