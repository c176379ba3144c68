"""Sessions of the owner's page: their secrets, their ends, and the wait after wrong passphrases."""

from types import SimpleNamespace

import pytest

from fedveil.deployment.owner_page import sessions
from fedveil.deployment.owner_page.sessions import (
    LIFE_SECONDS,
    LOCK_SECONDS,
    MAX_FAILURES,
    MAX_SESSIONS,
    OwnerSessions,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(sessions, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_session_of_a_passphrase_ends_with_its_time(clock: list[float]) -> None:
    opened = OwnerSessions()
    signed_in, printed = (opened.open("owner", has_passphrase=each) for each in (True, False))
    clock[0] = LIFE_SECONDS - 1
    assert opened.with_secret(signed_in.secret) == [signed_in]
    clock[0] = LIFE_SECONDS + 1
    assert opened.with_secret(signed_in.secret) == [] and opened.with_secret(printed.secret) == [printed]


def test_each_session_has_secrets_of_its_own_and_the_oldest_end() -> None:
    opened = OwnerSessions()
    made = [opened.open("owner", has_passphrase=True) for _ in range(MAX_SESSIONS + 1)]
    assert len({each.secret for each in made} | {each.csrf for each in made}) == 2 * len(made)
    assert opened.with_secret(made[0].secret) == [] and opened.with_secret(made[1].secret) == [made[1]]
    opened.close(made[1])
    assert opened.with_secret(made[1].secret) == [] and opened.with_secret("é") == []


def test_sign_in_waits_after_wrong_passphrases_in_a_row(clock: list[float]) -> None:
    opened = OwnerSessions()
    for _ in range(MAX_FAILURES - 1):
        opened.fail()
    opened.open("owner", has_passphrase=True)
    opened.fail()
    assert not opened.locked
    for _ in range(MAX_FAILURES - 1):
        opened.fail()
    assert opened.locked
    clock[0] = LOCK_SECONDS
    assert not opened.locked
