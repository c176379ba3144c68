"""Merkle trees against the test vectors of Certificate Transparency and against the RFC's own recursive definitions."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.merkle import (
    Frontier,
    consistency_proof,
    extends,
    includes,
    inclusion_proof,
    leaf_hash,
    root_of,
)

RFC: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "oracles" / "merkle_trees.py"))
LEAVES = [leaf_hash(each) for each in RFC["LEAVES"]]
# Roots of the first 0 to 8 leaves as Certificate Transparency's reference implementations publish them.
ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


def test_roots_are_the_published_ones() -> None:
    assert [root_of(LEAVES[:size]).hex() for size in range(9)] == list(ROOTS)
    assert [RFC["mth"](RFC["LEAVES"][:size]).hex() for size in range(9)] == list(ROOTS)


def test_proofs_are_those_of_the_definitions() -> None:
    for size in range(1, 9):
        entries, leaves = RFC["LEAVES"][:size], LEAVES[:size]
        for place in range(size):
            assert inclusion_proof(leaves, place) == RFC["path"](place, entries)
            assert consistency_proof(leaves, place + 1) == RFC["proof"](place + 1, entries)


@given(st.integers(1, 70), st.data())
@settings(max_examples=60)
def test_proof_shows_true_statements_alone(size: int, data: st.DataObject) -> None:
    entries = [bytes([number]) for number in range(size)]
    leaves, before = [leaf_hash(each) for each in entries], data.draw(st.integers(1, size))
    place = data.draw(st.integers(0, size - 1))
    root, first = root_of(leaves), root_of(leaves[:before])
    shown, later = inclusion_proof(leaves, place), consistency_proof(leaves, before)
    assert shown == RFC["path"](place, entries) and later == RFC["proof"](before, entries)
    assert includes(root, size, leaves[place], place, shown)
    assert extends(first, before, root, size, later)
    other = leaf_hash(b"another")
    assert not includes(root, size, other, place, shown)
    assert not includes(other, size, leaves[place], place, shown)
    assert not includes(root, size, leaves[place], place, [*shown, other])
    assert not any(
        includes(root, size, leaves[place], wrong, shown) for wrong in range(size) if wrong != place
    )
    assert not extends(other, before, root, size, later) and not extends(first, before, other, size, later)
    assert not extends(first, before, root, size, [*later, other])
    if later:
        wrong = data.draw(st.integers(0, len(later) - 1))
        assert not extends(first, before, root, size, [*later[:wrong], other, *later[wrong + 1 :]])
        assert not extends(first, before, root, size, later[:-1])


def test_absent_leaf_has_no_proof() -> None:
    for wrong in (-1, 8):
        with pytest.raises(ValueError):
            inclusion_proof(LEAVES, wrong)
        assert not includes(root_of(LEAVES), 8, LEAVES[0], wrong, [])
    for wrong in (0, 9):
        with pytest.raises(ValueError):
            consistency_proof(LEAVES, wrong)
        assert not extends(root_of(LEAVES), wrong, root_of(LEAVES), 8, [])
    assert not extends(root_of(LEAVES[:3]), 3, root_of(LEAVES), 8, [])


def test_an_entry_passes_for_no_node() -> None:
    """Of two leaves' hashes an entry can be made, whose leaf is not the node above the two."""
    forged = leaf_hash(LEAVES[0] + LEAVES[1])
    assert root_of([forged]) != root_of(LEAVES[:2])


@given(st.lists(st.integers(0, 9), max_size=6))
@settings(max_examples=40)
def test_a_frontier_that_grows_has_the_root_of_all(steps: list[int]) -> None:
    frontier, leaves = Frontier(), list[bytes]()
    for step in steps:
        fresh = [leaf_hash(bytes([len(leaves) + number])) for number in range(step)]
        kept = frontier.copy()
        frontier.add(fresh)
        leaves += fresh
        assert frontier.root == root_of(leaves) and frontier.size == len(leaves)
        assert kept.size == len(leaves) - step and len(frontier.peaks) == len(leaves).bit_count()
