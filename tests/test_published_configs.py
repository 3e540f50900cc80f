"""Configurations as published checkpoints have them, with the keys that only their authors' code reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dynamoe.dynamic.model.families import model_spec
from dynamoe.dynamic.model.text_part import text_config

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_understood(name: str) -> None:
    config = text_config(PUBLISHED[name])
    spec = model_spec(config)
    assert spec.num_layers == config["num_hidden_layers"]
    moe = spec.layers[-1].moe
    assert (moe.router.num_experts if moe else 0) == next((config[key] for key in EXPERTS if key in config), 0)
