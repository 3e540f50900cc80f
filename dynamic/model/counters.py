"""What a model executed, counted at the launches: for one request, for its tokens, between its processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCost:
    """What the rows that chose some generated tokens ran, one row per token.

    A prompt's last row chooses the first token of each of its completions, so that this one counts with all layers.

    Arguments:
        count: tokens.
        layers: in front of their exit heads.
        experts: used in these layers.
        weight_bytes: of the weights that the rows need, each read as if it ran alone: the layers in front of the
            exit head with the experts that were used, the exit head's adapter, the projections that fill in keys and
            values of the layers behind it, and the LM head. Embeddings and probes are left out.
        full_weight_bytes: the same for all layers with all experts.
    """

    count: int = 0
    layers: int = 0
    experts: int = 0
    weight_bytes: int = 0
    full_weight_bytes: int = 0

    def __add__(self, other: TokenCost) -> TokenCost:
        return TokenCost(
            count=self.count + other.count,
            layers=self.layers + other.layers,
            experts=self.experts + other.experts,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            full_weight_bytes=self.full_weight_bytes + other.full_weight_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """What the model executed for a request: prompt, output, and whatever was computed again. Counted at the launches.

    Arguments:
        segment_layers: layers of each segment between the model's exits.
        segment_rows: rows launched through each segment.
        segment_experts: experts that a row uses in each segment without a budget: chosen ones and those always on.
        projected_rows: rows times layers that were skipped; their keys and values were made of the state at an exit.
        skipped_experts: rows times experts that a budget left out of layers that ran.
        tokens: what chose the generated tokens; a part of the above.
    """

    segment_layers: tuple[int, ...]
    segment_rows: tuple[int, ...]
    segment_experts: tuple[int, ...]
    projected_rows: int = 0
    skipped_experts: int = 0
    tokens: TokenCost = TokenCost()

    @property
    def layer_rows(self) -> int:
        """Rows times layers executed."""
        return sum(layers * rows for layers, rows in zip(self.segment_layers, self.segment_rows, strict=True))

    @property
    def full_expert_rows(self) -> int:
        """Rows times experts that the executed layers would have used without a budget."""
        return sum(experts * rows for experts, rows in zip(self.segment_experts, self.segment_rows, strict=True))

    @property
    def expert_rows(self) -> int:
        """Rows times experts executed."""
        return self.full_expert_rows - self.skipped_experts


@dataclass(frozen=True, kw_only=True)
class ExpertTraffic:
    """Where experts came from whose model is larger than its memory. An expert counts once for each step that uses it.

    Arguments:
        uses: experts that steps have used.
        hits: of these, those that were in memory from earlier steps.
        early: of these, those that were read ahead, in part maybe.
        reads, read_bytes: experts that were read from the disk, ahead or not.
        foreseen, foreseeable: uses of which it was expected that they would come; all for which something was expected.
    """

    uses: int = 0
    hits: int = 0
    early: int = 0
    reads: int = 0
    read_bytes: int = 0
    foreseen: int = 0
    foreseeable: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What went between the processes of one model, as rank 0 saw it.

    Arguments:
        received: bytes from other ranks, by what for: ``sums``, ``embedding``, ``logits``, ``stages``, ``dispatch``,
            ``combine``, ``sizes``, ``rows``, ``moves``.
        expert_rows: by rank of the expert axis, rows times experts that it ran, in the layers of the first stage; empty
            without that axis.
        imbalance: where experts move, the most loaded rank's slots over the mean, of all layers of the last window;
            None before its end.
        expert_moves: experts that were brought to another rank so far.
    """

    received: dict[str, int]
    expert_rows: tuple[int, ...]
    imbalance: float | None = None
    expert_moves: int = 0
