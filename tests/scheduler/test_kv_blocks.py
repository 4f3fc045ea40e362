"""The block pool by itself."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from moestro.workers.kv_blocks import ROOT_DIGEST, BlockPool, chain_digest

A = chain_digest(ROOT_DIGEST, [1, 2])
B = chain_digest(A, [3, 4])


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate() for _ in range(pool.num_free)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity([1, 2, 3, 4])


def test_a_pool_has_at_least_one_block_to_give() -> None:
    with pytest.raises(ValueError, match=r"num_blocks must be at least 2.*not 1"):
        BlockPool(1)


def test_a_freed_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, A)
    pool.publish(second, B)
    pool.release(first)
    pool.release(second)
    assert (pool.find(A), pool.find(B), pool.num_free) == (first, second, 2)
    pool.share(first)  # found: no longer the oldest, no longer free
    assert pool.allocate() == second
    assert (pool.find(A), pool.find(B), pool.num_free) == (first, None, 0)


def test_the_least_recently_held_contents_go_first_and_empty_blocks_before_any() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(3)]
    pool.publish(blocks[0], A)
    pool.publish(blocks[1], B)
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    assert [pool.allocate() for _ in range(3)] == [blocks[2], blocks[1], blocks[0]]


def test_the_first_of_two_blocks_with_equal_contents_is_the_one_found() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, A)
    pool.publish(second, A)
    assert (pool.find(A), pool.digest_of(second)) == (first, None)
    pool.forget(first)
    assert pool.find(A) is None
    pool.check_integrity([first, second])


def test_a_block_released_too_often_is_an_error() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match="released more often"):
        pool.release(block)


@pytest.mark.parametrize("corrupt", ["leak", "share", "null", "name"])
def test_integrity_check_sees(corrupt: str) -> None:
    """The check that the other tests lean on does notice."""
    pool = BlockPool(4)
    block = pool.allocate()
    held = [block]
    if corrupt == "leak":
        held = []
    elif corrupt == "share":
        held = [block, block]
    elif corrupt == "null":
        held = [block, 0]
    else:
        pool._block_of[A] = block
    with pytest.raises(AssertionError):
        pool.check_integrity(held)


def test_digests_name_the_whole_prefix_and_are_the_same_in_every_process() -> None:
    names = {chain_digest(p, t) for p in (ROOT_DIGEST, A, B) for t in ([1, 2], [2, 1], [3, 4], [1, 2**31])}
    assert len(names) == 12
    code = (
        "from moestro.workers.kv_blocks import *; print(chain_digest(chain_digest(ROOT_DIGEST, [1, 2]), [3, 4]).hex())"
    )
    for seed in ("1", "2"):
        env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == B.hex()


@pytest.mark.parametrize("seed", range(20))
def test_random_use_against_a_plain_model(seed: int) -> None:
    """A dictionary of references and one of contents say the same as the pool, whatever is done to it."""
    rng = random.Random(seed)
    pool = BlockPool(rng.randint(2, 12))
    held: list[int] = []
    names = [chain_digest(ROOT_DIGEST, [i]) for i in range(8)]
    contents: dict[int, bytes] = {}
    for _ in range(400):
        action = rng.choice(["allocate", "allocate", "release", "release", "publish", "share", "forget"])
        if action == "allocate" and pool.num_free:
            block = pool.allocate()
            assert block not in held
            contents.pop(block, None)
            held.append(block)
        elif action == "release" and held:
            pool.release(held.pop(rng.randrange(len(held))))
        elif action == "publish" and held:
            block, name = rng.choice(held), rng.choice(names)
            if block not in contents and name not in contents.values():
                contents[block] = name
            pool.publish(block, name)
        elif action == "share":
            found = pool.find(rng.choice(names))
            if found is not None:
                pool.share(found)
                held.append(found)
        elif action == "forget" and held:
            block = rng.choice(held)
            contents.pop(block, None)
            pool.forget(block)
        pool.check_integrity(held)
        assert pool.num_used == len(set(held)) == pool.num_usable - pool.num_free
        assert all(pool.find(name) == block for block, name in contents.items())
