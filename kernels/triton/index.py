"""The tables that grouped GEMMs walk: slots in expert order, where every expert begins, and tiles of rows.

A counting sort, so the order within an expert is the order of the rows and never depends on timing. Every program of
the launch before (routing, or :func:`rank_kernel`) counts how many slots of its rows go to every expert and ranks them;
the last program to finish turns the counts into positions. Above ``SINGLE_LAUNCH_TOKENS`` these two steps get launches
of their own.

Shape suffixes: R rows of a chunk, E real experts, K choices, X = T * K slots; the rest as in ``types.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl

from ..api.types import Routing
from .launch import Launch, cdiv, next_power_of_2

SINGLE_LAUNCH_TOKENS = 1024


@triton.jit
def rank_and_count(
    ids_RK, used_RK, rows_R, rows_ok_R, slot_RK, ranks_ptr, counts_ptr, chunk,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rank every used slot among the chunk's slots of the same expert, in row order; count the slots per expert."""
    expert_E = tl.arange(0, E_PAD)[None, :]
    choice_K = tl.arange(0, K_PAD)[None, :]
    used_RK = used_RK & rows_ok_R[:, None]
    masked_RK = tl.where(used_RK, ids_RK, -1)
    hits_RE = tl.zeros((ROWS, E_PAD), dtype=tl.int32)
    for k in range(K):
        id_R = tl.max(tl.where(choice_K == k, masked_RK, -1), axis=1)
        hits_RE += (expert_E == id_R[:, None]).to(tl.int32)
    base_RE = tl.cumsum(hits_RE, axis=0) - hits_RE
    ranks_RK = tl.zeros((ROWS, K_PAD), dtype=tl.int32)
    for k in range(K):
        id_R = tl.max(tl.where(choice_K == k, masked_RK, -1), axis=1)
        hit_RE = expert_E == id_R[:, None]
        rank_R = tl.sum(tl.where(hit_RE, base_RE, 0), axis=1)
        ranks_RK = tl.where(choice_K == k, rank_R[:, None], ranks_RK)
        base_RE += hit_RE.to(tl.int32)
    tl.store(ranks_ptr + slot_RK, ranks_RK, mask=used_RK)
    total_E = tl.sum(hits_RE, axis=0)
    lane_E = tl.arange(0, E_PAD)
    tl.store(counts_ptr + chunk * E + lane_E, total_E, mask=lane_E < E)


@triton.jit(do_not_specialize=["num_chunks"])
def scan_kernel(
    counts_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, num_chunks,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Turn counts per chunk into offsets per chunk, experts into row ranges, and row ranges into tiles of BLOCK_M: the
    second of three launches, or part of the only one."""
    lane_E = tl.arange(0, E_PAD)
    ok_E = lane_E < E
    total_E = tl.zeros((E_PAD,), dtype=tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        chunk_C = first + tl.arange(0, CHUNKS)
        at_CE = counts_ptr + chunk_C[:, None] * E + lane_E[None, :]
        ok_CE = (chunk_C < num_chunks)[:, None] & ok_E[None, :]
        counts_CE = tl.load(at_CE, mask=ok_CE, other=0, cache_modifier=".cg")
        offsets_CE = total_E[None, :] + tl.cumsum(counts_CE, axis=0) - counts_CE
        tl.store(at_CE, offsets_CE, mask=ok_CE)
        total_E += tl.sum(counts_CE, axis=0)
    start_E = tl.cumsum(total_E, axis=0) - total_E
    tl.store(starts_ptr + lane_E, start_E, mask=ok_E)
    tl.store(starts_ptr + E, tl.sum(total_E, axis=0))
    tiles_E = (total_E + BLOCK_M - 1) // BLOCK_M
    tile_start_E = tl.cumsum(tiles_E, axis=0) - tiles_E
    tl.store(num_tiles_ptr, tl.sum(tiles_E, axis=0))
    for j in range(tl.max(tiles_E, axis=0)):
        mask_E = j < tiles_E
        tl.store(tile_expert_ptr + tile_start_E + j, lane_E, mask=mask_E)
        tl.store(tile_row_ptr + tile_start_E + j, start_E + j * BLOCK_M, mask=mask_E)


@triton.jit
def _scatter(
    ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, first_slot, num_slots,
    E: tl.constexpr, K: tl.constexpr, CHUNK_ROWS: tl.constexpr, SLOTS: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """Write SLOTS slots to their places in expert order."""
    slot_X = first_slot + tl.arange(0, SLOTS)
    ok_X = slot_X < num_slots
    row_X = slot_X // K
    if HAS_COUNTS:
        used_X = tl.load(used_counts_ptr + row_X, mask=ok_X, other=0, cache_modifier=".cg")
        ok_X = ok_X & (slot_X - row_X * K < used_X)
    id_X = tl.load(ids_ptr + slot_X, mask=ok_X, other=0, cache_modifier=".cg")
    rank_X = tl.load(ranks_ptr + slot_X, mask=ok_X, other=0, cache_modifier=".cg")
    offset_X = tl.load(counts_ptr + (row_X // CHUNK_ROWS) * E + id_X, mask=ok_X, other=0, cache_modifier=".cg")
    start_X = tl.load(starts_ptr + id_X, mask=ok_X, other=0, cache_modifier=".cg")
    tl.store(sorted_ptr + start_X + offset_X + rank_X, slot_X, mask=ok_X)


@triton.jit
def finish_index(
    ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, tile_expert_ptr, tile_row_ptr,
    num_tiles_ptr, ticket_ptr, num_tokens,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr, SLOTS: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """The last program of the launch builds the tables of all chunks. The ticket is back at zero afterwards."""
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        scan_kernel(
            counts_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, tl.num_programs(0),
            E, E_PAD, BLOCK_M, CHUNKS,
        )  # fmt: skip
        tl.debug_barrier()
        for first in range(0, num_tokens * K, SLOTS):
            _scatter(
                ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, first, num_tokens * K,
                E, K, ROWS, SLOTS, HAS_COUNTS,
            )  # fmt: skip
        tl.store(ticket_ptr, 0)


@triton.jit(do_not_specialize=["num_tokens"])
def rank_kernel(
    ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, tile_expert_ptr, tile_row_ptr,
    num_tiles_ptr, ticket_ptr, num_tokens,
    E: tl.constexpr, E_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, SLOTS: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """The tables of a routing that came from elsewhere (expert budgets, other ranks)."""
    chunk = tl.program_id(0)
    rows_R = chunk * ROWS + tl.arange(0, ROWS)
    rows_ok_R = rows_R < num_tokens
    slot_K = tl.arange(0, K_PAD)[None, :]
    slot_RK = rows_R[:, None] * K + slot_K
    used_RK = rows_ok_R[:, None] & (slot_K < K)
    if used_counts_ptr is not None:
        used_RK = used_RK & (slot_K < tl.load(used_counts_ptr + rows_R, mask=rows_ok_R, other=0)[:, None])
    ids_RK = tl.load(ids_ptr + slot_RK, mask=used_RK, other=-1)
    rank_and_count(ids_RK, used_RK, rows_R, rows_ok_R, slot_RK, ranks_ptr, counts_ptr, chunk, E, E_PAD, K, K_PAD, ROWS)
    if FINISH:
        finish_index(
            ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, tile_expert_ptr, tile_row_ptr,
            num_tiles_ptr, ticket_ptr, num_tokens,
            E, E_PAD, K, ROWS, BLOCK_M, CHUNKS, SLOTS, used_counts_ptr is not None,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots"])
def scatter_kernel(
    ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, num_slots,
    E: tl.constexpr, K: tl.constexpr, CHUNK_ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Third of three launches: see :func:`_scatter`."""
    first = tl.program_id(0) * SLOTS
    _scatter(
        ids_ptr, used_counts_ptr, ranks_ptr, counts_ptr, starts_ptr, sorted_ptr, first, num_slots,
        E, K, CHUNK_ROWS, SLOTS, used_counts_ptr is not None,
    )  # fmt: skip


index_kernels = (rank_kernel, scan_kernel, scatter_kernel)


@dataclass(frozen=True, kw_only=True)
class ExpertIndex:
    """The slots of a routing in expert order, and the row tiles that grouped GEMMs walk. All on the device.

    ``routed_ids_TK`` and ``routed_counts_T`` are the tensors that it was built from: a routing whose tensors were
    replaced is recognised by them.
    """

    block_m: int
    max_tiles: int
    num_experts: int
    sorted_slots_X: torch.Tensor  # int32; entry i is the slot (row * K + k) that comes i-th in expert order
    starts_E1: torch.Tensor  # int32; expert e owns entries starts[e] : starts[e + 1]
    tile_expert: torch.Tensor  # int32
    tile_row: torch.Tensor  # int32, first entry of the tile
    num_tiles: torch.Tensor  # int32, one element: tiles in use
    routed_ids_TK: torch.Tensor
    routed_counts_T: torch.Tensor | None

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """The tables as kernels take them."""
        return {
            "sorted_ptr": self.sorted_slots_X,
            "starts_ptr": self.starts_E1,
            "tile_expert_ptr": self.tile_expert,
            "tile_row_ptr": self.tile_row,
            "num_tiles_ptr": self.num_tiles,
        }

    def matches(self, routing: Routing, num_experts: int) -> bool:
        """Whether this index describes ``routing``."""
        same = self.routed_ids_TK is routing.expert_ids_TK and self.routed_counts_T is routing.counts_T
        return same and self.num_experts == num_experts


def max_row_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Most tiles of ``block_m`` rows that any routing of so many slots can need."""
    hit = min(num_experts, num_slots)
    return (num_slots + hit * (block_m - 1)) // block_m


@dataclass(frozen=True, kw_only=True)
class IndexTables:
    """What the first launch of an index build takes, and the launches that follow it."""

    index: ExpertIndex
    num_chunks: int
    single: bool
    args: dict[str, Any]
    constexprs: dict[str, int]

    def following(self) -> list[Launch]:
        if self.single:
            return []
        a, c = self.args, self.constexprs
        scan = ("counts_ptr", "starts_ptr", "tile_expert_ptr", "tile_row_ptr", "num_tiles_ptr")
        scatter = ("ids_ptr", "used_counts_ptr", "ranks_ptr", "counts_ptr", "starts_ptr", "sorted_ptr")
        num_slots = a["ids_ptr"].numel()
        return [
            Launch(
                kernel=scan_kernel,
                grid=(1,),
                args={**{k: a[k] for k in scan}, "num_chunks": self.num_chunks},
                constexprs={k: c[k] for k in ("E", "E_PAD", "BLOCK_M", "CHUNKS")},
                num_warps=8,
            ),
            Launch(
                kernel=scatter_kernel,
                grid=(cdiv(num_slots, c["SLOTS"]),),
                args={**{k: a[k] for k in scatter}, "num_slots": num_slots},
                constexprs={"E": c["E"], "K": c["K"], "CHUNK_ROWS": c["ROWS"], "SLOTS": c["SLOTS"]},
            ),
        ]


def index_tables(
    ids_TK: torch.Tensor, counts_T: torch.Tensor | None, num_experts: int, block_m: int, ticket: torch.Tensor
) -> IndexTables:
    num_tokens, top_k = ids_TK.shape
    num_slots, device = num_tokens * top_k, ids_TK.device
    e_pad, single = next_power_of_2(num_experts), num_tokens <= SINGLE_LAUNCH_TOKENS
    # Rows per program: small enough that a decode step spreads, large enough that the scan stays short.
    rows = min(max(1, 2048 // e_pad), 8 if single else 16)
    num_chunks = cdiv(num_tokens, rows)
    max_tiles = max_row_tiles(num_slots, num_experts, block_m)

    # One allocation for all tables; parts start at multiples of 16 bytes, which the kernels' loads rely on.
    sizes = (num_slots, num_experts + 1, max_tiles, max_tiles, 1, num_slots, num_chunks * num_experts)
    padded = [cdiv(size, 4) * 4 for size in sizes]
    parts = torch.empty(sum(padded), dtype=torch.int32, device=device).split(padded)
    sorted_X, starts_E1, tile_expert, tile_row, num_tiles, ranks, counts = (
        part[:size] for part, size in zip(parts, sizes, strict=True)
    )
    index = ExpertIndex(
        block_m=block_m,
        max_tiles=max_tiles,
        num_experts=num_experts,
        sorted_slots_X=sorted_X,
        starts_E1=starts_E1,
        tile_expert=tile_expert,
        tile_row=tile_row,
        num_tiles=num_tiles,
        routed_ids_TK=ids_TK,
        routed_counts_T=counts_T,
    )
    return IndexTables(
        index=index,
        num_chunks=num_chunks,
        single=single,
        args={
            "ids_ptr": ids_TK,
            "used_counts_ptr": counts_T,
            "ranks_ptr": ranks,
            "counts_ptr": counts,
            **index.arguments,
            "ticket_ptr": ticket,
            "num_tokens": num_tokens,
        },
        constexprs={
            "E": num_experts,
            "E_PAD": e_pad,
            "K": top_k,
            "K_PAD": next_power_of_2(top_k),
            "ROWS": rows,
            "BLOCK_M": block_m,
            "CHUNKS": max(1, min(32, 4096 // e_pad)),
            "SLOTS": 512,
        },
    )


def plan_index(
    routing: Routing, num_experts: int, block_m: int, ticket: torch.Tensor
) -> tuple[ExpertIndex, list[Launch]]:
    """The tables of a routing, and the one or three launches that fill them.

    Arguments:
        ticket: int32, one element, zero between launches of a stream.
    """
    tables = index_tables(routing.expert_ids_TK, routing.counts_T, num_experts, block_m, ticket)
    constexprs = {**tables.constexprs, "FINISH": tables.single}
    first = Launch(kernel=rank_kernel, grid=(tables.num_chunks,), args=tables.args, constexprs=constexprs)
    return tables.index, [first, *tables.following()]


def usable_index(
    routing: Routing, num_experts: int, block_m: int, ticket: torch.Tensor
) -> tuple[ExpertIndex, list[Launch]]:
    """The routing's own tables, or new ones when it has none of this tile or its tensors were replaced since."""
    index = routing.index
    if isinstance(index, ExpertIndex) and index.block_m == block_m and index.matches(routing, num_experts):
        return index, []
    return plan_index(routing, num_experts, block_m, ticket)
