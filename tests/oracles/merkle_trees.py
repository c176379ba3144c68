"""Merkle trees of RFC 9162 as the RFC's recursive definitions have them, one definition a line; slow, and of another make.

`python tests/oracles/merkle_trees.py` prints the vectors that tests/privacy/test_merkle.py holds: the leaves are those of
the test vectors of Certificate Transparency's reference implementations (transparency-dev/merkle, testonly).
"""

from hashlib import sha256

LEAVES = [bytes.fromhex(each) for each in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                                           "606162636465666768696a6b6c6d6e6f")]  # fmt: skip


def k(n: int) -> int:
    """The largest power of two smaller than n."""
    return max(2**i for i in range(n.bit_length()) if 2**i < n)


def mth(d: list[bytes]) -> bytes:
    """Section 2.1.1."""
    if not d:
        return sha256(b"").digest()
    if len(d) == 1:
        return sha256(b"\x00" + d[0]).digest()
    return sha256(b"\x01" + mth(d[: k(len(d))]) + mth(d[k(len(d)) :])).digest()


def path(m: int, d: list[bytes]) -> list[bytes]:
    """Section 2.1.3.1."""
    if len(d) == 1:
        return []
    n = k(len(d))
    return [*path(m, d[:n]), mth(d[n:])] if m < n else [*path(m - n, d[n:]), mth(d[:n])]


def subproof(m: int, d: list[bytes], b: bool) -> list[bytes]:
    """Section 2.1.4.1."""
    if m == len(d):
        return [] if b else [mth(d)]
    n = k(len(d))
    return [*subproof(m, d[:n], b), mth(d[n:])] if m <= n else [*subproof(m - n, d[n:], False), mth(d[:n])]


def proof(m: int, d: list[bytes]) -> list[bytes]:
    """Section 2.1.4.1."""
    return subproof(m, d, True)


if __name__ == "__main__":
    for size in range(len(LEAVES) + 1):
        print("root", size, mth(LEAVES[:size]).hex())
    for place, size in ((0, 1), (0, 8), (5, 8), (2, 3), (1, 5)):
        print("inclusion", place, size, [each.hex() for each in path(place, LEAVES[:size])])
    for first, second in ((1, 1), (1, 8), (6, 8), (2, 5)):
        print("consistency", first, second, [each.hex() for each in proof(first, LEAVES[:second])])
