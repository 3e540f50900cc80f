"""Pages: reference counts, what is forgotten first, and the digests by which equal beginnings find each other."""

from __future__ import annotations

import pytest
from dynamoe.dynamic.engine.block_pool import BlockPool
from dynamoe.dynamic.engine.prefix_cache import PrefixCache
from dynamoe.dynamic.engine.request import Sequence
from request_maker import make_sequence


def fill(pool: BlockPool, cache: PrefixCache, sequence: Sequence) -> None:
    sequence.pages.extend(pool.allocate() for _ in range(-(-sequence.num_tokens // cache.page_size)))
    sequence.num_computed = sequence.num_tokens
    cache.publish(sequence, 0)


def test_every_page_is_handed_out_once_and_comes_back() -> None:
    pool = BlockPool(5)
    pages = [pool.allocate() for _ in range(5)]
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.retain(pages[0])
    pool.release(pages)
    assert pool.num_free == 4  # one page has a second holder
    pool.release(pages[:1])
    assert pool.num_free == 5


def test_releasing_a_page_nobody_holds_is_an_error() -> None:
    with pytest.raises(AssertionError, match="page 0"):
        BlockPool(1).release([0])


def test_the_content_released_longest_ago_is_forgotten_first() -> None:
    pool = BlockPool(3)
    pages = [pool.allocate() for _ in range(3)]
    for page, digest in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.publish(page, digest)
    pool.release([pages[1], pages[0], pages[2]])
    pool.retain(pages[1])  # used again, so it is now the most recent
    pool.release([pages[1]])
    assert [pool.allocate(), pool.allocate()] == [pages[0], pages[2]]
    assert (pool.find(b"a"), pool.find(b"b"), pool.find(b"c")) == (None, pages[1], None)


def test_empty_pages_go_before_those_with_content() -> None:
    pool = BlockPool(2)
    known, other = pool.allocate(), pool.allocate()
    pool.publish(known, b"a")
    pool.release([known, other])
    assert pool.allocate() == other
    assert pool.find(b"a") == known


def test_a_second_page_with_the_same_content_stays_nameless() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.release([second])
    assert pool.find(b"a") == first
    assert pool.allocate() == second


def test_kv_shards_have_their_own_pages_and_contents() -> None:
    pool = BlockPool(6, kv_shards=2)
    here, there = pool.allocate(0), pool.allocate(1)
    assert here < 3 <= there
    pool.publish(here, b"a")
    assert (pool.find(b"a", 0), pool.find(b"a", 1)) == (here, None)
    pool.publish(there, b"a")
    assert (pool.find(b"a", 0), pool.find(b"a", 1)) == (here, there)
    pool.release([here, there])
    assert (pool.free_in(0), pool.free_in(1), pool.num_free) == (3, 3, 6)
    taken = [pool.allocate(1) for _ in range(3)]
    assert sorted(taken) == [3, 4, 5]
    assert (pool.find(b"a", 0), pool.find(b"a", 1)) == (here, None)
    pool.release(taken)


def test_prefixes_are_found_by_full_blocks_and_leave_a_token_to_compute() -> None:
    pool = BlockPool(20)
    cache = PrefixCache(pool, 4, enabled=True)
    first = make_sequence(list(range(12)))
    fill(pool, cache, first)
    assert cache.lookup(make_sequence([*range(12), 99]))[0] == list(first.pages)
    assert cache.lookup(make_sequence(list(range(12))))[0] == list(first.pages[:2])  # all 12 cached, the last must run
    assert cache.lookup(make_sequence([*range(7), 99, *range(8, 13)]))[0] == list(first.pages[:1])
    assert cache.lookup(make_sequence([99, *range(1, 13)]))[0] == []


def test_a_block_is_found_only_behind_the_same_blocks() -> None:
    pool = BlockPool(20)
    cache = PrefixCache(pool, 2, enabled=True)
    fill(pool, cache, make_sequence([1, 2, 3, 4]))
    fill(pool, cache, make_sequence([3, 4, 1, 2]))
    assert len(cache.lookup(make_sequence([3, 4, 3, 4, 5]))[0]) == 1


def test_salts_keep_requests_apart() -> None:
    pool = BlockPool(20)
    cache = PrefixCache(pool, 2, enabled=True)
    fill(pool, cache, make_sequence([1, 2, 3], salt="tenant"))
    assert cache.lookup(make_sequence([1, 2, 3]))[0] == []
    assert cache.lookup(make_sequence([1, 2, 3], salt=""))[0] == []
    assert cache.lookup(make_sequence([1, 2, 3], salt="other"))[0] == []
    assert len(cache.lookup(make_sequence([1, 2, 3], salt="tenant"))[0]) == 1


def test_requests_with_prompt_logprobs_and_switched_off_caches_find_nothing() -> None:
    pool = BlockPool(20)
    cache = PrefixCache(pool, 2, enabled=True)
    fill(pool, cache, make_sequence([1, 2, 3]))
    assert cache.lookup(make_sequence([1, 2, 3], prompt_logprobs=0))[0] == []
    off = PrefixCache(BlockPool(20), 2, enabled=False)
    fill(off.pool, off, make_sequence([1, 2, 3]))
    assert off.lookup(make_sequence([1, 2, 3]))[0] == []


def test_a_sequence_that_was_approximate_takes_no_exact_page_beyond_that_point() -> None:
    pool = BlockPool(20)
    cache = PrefixCache(pool, 4, enabled=True)
    exact, early = make_sequence(list(range(18))), make_sequence(list(range(18)))
    fill(pool, cache, exact)
    assert cache.lookup(early)[0] == list(exact.pages[:4])
    early.first_approximate = 9  # it lost its pages and is computed again
    assert cache.lookup(early)[0] == list(exact.pages[:2])


def test_approximate_pages_can_neither_be_found_nor_shared() -> None:
    pool = BlockPool(20)
    cache = PrefixCache(pool, 4, enabled=True)
    sequence = make_sequence(list(range(18)))
    sequence.first_approximate = 9
    fill(pool, cache, sequence)
    assert cache.lookup(make_sequence(list(range(18))))[0] == list(sequence.pages[:2])
    page = sequence.pages[3]
    pool.mark_approximate(page)
    with pytest.raises(AssertionError, match="approximate and cannot be found"):
        pool.publish(page, b"x")
    with pytest.raises(AssertionError, match="approximate and cannot be shared"):
        pool.retain(page)
    with pytest.raises(AssertionError, match="can be found"):
        pool.mark_approximate(sequence.pages[0])
    pool.release([page])
    assert [pool.is_exact(pool.allocate()) for _ in range(16)] == [True] * 16
