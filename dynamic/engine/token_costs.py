"""What choosing one token costs, by the layers in front of its exit head and the experts that its budget left out."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from ..model.counters import TokenCost

if TYPE_CHECKING:
    from ..model.decoder import Decoder
    from ..model.layer_weights import LayerWeights
    from ..model.spec import LayerSpec


class TokenTally:
    """Adds up costs in place: the step loop does so twice for every token."""

    __slots__ = ("count", "experts", "full_weight_bytes", "layers", "weight_bytes")

    def __init__(self) -> None:
        self.count = self.layers = self.experts = self.weight_bytes = self.full_weight_bytes = 0

    def add(self, cost: TokenCost) -> None:
        """Count one more token, or several."""
        self.count += cost.count
        self.layers += cost.layers
        self.experts += cost.experts
        self.weight_bytes += cost.weight_bytes
        self.full_weight_bytes += cost.full_weight_bytes

    def total(self) -> TokenCost:
        """What was added so far."""
        return TokenCost(**{name: getattr(self, name) for name in self.__slots__})


class TokenCosts:
    """The price list of one model. Sizes are those of the weights as the backend keeps them."""

    def __init__(self, decoder: Decoder) -> None:
        layers = list(zip(decoder.layers, decoder.spec.layers, strict=True))
        self._num_layers = len(layers)
        used = [decoder.spec.experts_in(range(n, n + 1)) for n in range(len(layers))]
        self._expert_bytes = max((_expert_bytes(*layer) for layer in layers), default=0)
        # Several processes may each hold a part of the LM head.
        whole_head = decoder.lm_head.nbytes * decoder.spec.vocab_size // decoder.lm_head.out_features
        head = whole_head + decoder.final_norm_D.nbytes
        sizes = [_layer_bytes(*layer, used=count) for layer, count in zip(layers, used, strict=True)]
        # By the number of layers in front of the exit head.
        self._experts = list(accumulate(used, initial=0))
        self._bytes = [head + size for size in accumulate(sizes, initial=0)]
        for exit in decoder.exits.values():
            # The projections share the memory of the layers' own, and with it carry no size.
            filled_in = sum(weights.attention.propagated_bytes for weights in decoder.layers[exit.after_layers :])
            self._bytes[exit.after_layers] += exit.down.nbytes + exit.up.nbytes + filled_in
        self.of = lru_cache(maxsize=1024)(self._of)

    def _of(self, layers: int, skipped_experts: int) -> TokenCost:
        """The cost of one token.

        Arguments:
            layers: in front of its exit head.
            skipped_experts: that its row did without in these layers.
        """
        return TokenCost(
            count=1,
            layers=layers,
            experts=self._experts[layers] - skipped_experts,
            weight_bytes=self._bytes[layers] - skipped_experts * self._expert_bytes,
            full_weight_bytes=self._bytes[self._num_layers],
        )


def _expert_bytes(weights: LayerWeights, layer: LayerSpec) -> int:
    return weights.ffn.nbytes // layer.moe.num_experts if layer.moe else 0


def _layer_bytes(weights: LayerWeights, layer: LayerSpec, used: int) -> int:
    """Bytes of a layer that one row needs which uses so many of its experts."""
    experts = _expert_bytes(weights, layer) * used if layer.moe else weights.ffn.nbytes
    scales = weights.contribution_scale_E
    return weights.nbytes - weights.ffn.nbytes - (0 if scales is None else scales.nbytes) + experts
