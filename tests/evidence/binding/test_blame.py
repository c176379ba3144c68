"""Blame of a run: evidence proves what its line says, once, under the authority's roster, and nothing else does."""

import json
import random
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.base.refusal import Refusal
from fedveil.evidence.binding import blame
from fedveil.evidence.binding.blame import Claim, check_blame, require_proved
from fedveil.evidence.binding.bound_folder import BoundFolder, Knowledge, NotShown
from fedveil.privacy.secagg.complaint import PROOF_BYTES
from fedveil.privacy.secagg.refusal import Fault
from fedveil.privacy.secagg.roster import Roster, write_roster
from fedveil.privacy.secagg.transcript import run_number
from fedveil.run.manifest import Manifest

FAULTS = Path(__file__).parents[2] / "faults"
COHORT = runpy.run_path(str(FAULTS / "secagg_cohort.py"))
CHEATS = runpy.run_path(str(FAULTS / "secagg_cheats.py"))
AUTHORITY, FORGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
KEY = AUTHORITY.public_key().public_bytes_raw().hex()
RUN, CHEAT = "spring@1", "hospital3"
BAD = str(Fault.BAD_DEAL)
SIZE, THRESHOLD = 12, 7


def cohort_of(suite: int) -> Any:
    cohort = COHORT["Cohort"](SIZE, THRESHOLD, minimum=4, suite=suite, collusion=0.1)
    named = (replace(each, name=f"hospital{place}") for place, each in enumerate(cohort.roster.members))
    cohort.roster = Roster(3, tuple(named))
    for node in cohort.nodes.values():
        node.roster = cohort.roster
    return cohort


def line_of(cohort: Any, evidence: Any, signer: Ed25519PrivateKey, number: int = 1) -> str:
    row = {"run": RUN, "round": number, "roster": write_roster(cohort.roster, signer).hex()}
    return json.dumps({**row, **evidence.to_json()}) + "\n"


@pytest.fixture(scope="module", params=[1, 2])
def proof(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A cohort, and the evidence of its round 3, in which one member deals garbage."""
    cohort = cohort_of(request.param)
    node = list(cohort.nodes)[3]
    honest = cohort.nodes[node]
    cheat = cohort.nodes[node] = CHEATS["Cheat"](node, honest.key, honest.policy, cohort.roster)
    cheat.way, cheat.hands, cheat.friends = "garbage seals", random.Random(0), frozenset({node})
    attempt = cohort.attempt(8, 3, run=run_number(RUN))
    result, vectors = attempt.proposal(), cohort.vectors(8)
    while isinstance(result, dict):
        cohort.exchange(attempt, COHORT["STAGE_OF"][attempt.due], result, vectors)
        result = attempt.advance(COHORT["MODEL"])
    assert attempt.blamed == {node: Fault.BAD_DEAL}
    return cohort, attempt.evidence


@pytest.fixture
def prove(tmp_path: Path, proof: tuple[Any, Any]) -> Callable[..., str]:
    """Write lines of evidence, and require that they prove claims."""
    (tmp_path / "config.yaml").write_text("secagg:\n  collusion: 0.1\n")
    result = {"data": "real", "rosters": [{"hash": proof[0].roster.hash.hex()}]}

    def proved(lines: str, claims: list[Claim], keys: list[str] | None = None) -> str:
        (tmp_path / "blame.jsonl").write_text(lines)
        return require_proved(tmp_path, RUN, claims, result, [KEY] if keys is None else keys)

    return proved


def test_evidence_under_the_roster_of_another_key_proves_nothing(
    proof: tuple[Any, Any], prove: Callable[..., str]
) -> None:
    """Whoever makes up the members makes up what they signed."""
    claims = [(3, CHEAT, BAD)]
    assert prove(line_of(*proof, AUTHORITY, 3), claims) == "1 faults are proved by what members signed"
    for keys in ([KEY], ["00" * 32, KEY]):
        with pytest.raises(Refusal, match="not signed by the authority"):
            prove(line_of(*proof, FORGER, 3), claims, keys)


def test_without_the_authoritys_key_evidence_decides_nothing(tmp_path: Path, proof: tuple[Any, Any]) -> None:
    cohort, evidence = proof
    (tmp_path / "config.yaml").write_text("secagg:\n  collusion: 0.1\n")
    result = {"data": "real", "status": "completed", "blamed": {CHEAT: [BAD]}}
    rounds = [{"round": 3, "blamed": {CHEAT: BAD}}]

    def check(*keys: str, **files: str) -> str:
        """Check the blame of a run, with these keys of the verifier and these files in the manifest."""
        folder = BoundFolder(tmp_path, False, Knowledge(keys))
        vars(folder).update(result=result, rounds=rounds, manifest=Manifest(RUN, "completed", files))
        return check_blame(folder)

    for rosters in ([{"hash": cohort.roster.hash.hex()}], []):  # deployed, and on one machine
        result["rosters"] = rosters
        (tmp_path / "blame.jsonl").write_text(line_of(cohort, evidence, FORGER, 3))
        with pytest.raises(NotShown, match="give the authority's key with --key"):
            check()
        with pytest.raises(Refusal, match="not signed by the authority"):
            check(KEY)
        (tmp_path / "blame.jsonl").write_text(line_of(cohort, evidence, AUTHORITY, 3))
        assert check(KEY) == "1 faults are proved by what members signed"
    (tmp_path / "blame.jsonl").unlink()  # an earlier release kept no evidence
    with pytest.raises(NotShown, match="the server's word"):
        check(KEY)
    with pytest.raises(Refusal, match="proves it"):
        check(KEY, **{"blame.jsonl": "0" * 64})


@pytest.mark.parametrize(
    "torn", ['{"run": "spr\n', "[]\n", "{}\n", '{"run": 1e999, "round": "x"}\n', "[" * 10**5 + "\n"]
)
def test_a_line_that_proves_nothing_costs_no_other_its_proof(
    proof: tuple[Any, Any], prove: Callable[..., str], torn: str
) -> None:
    good, claims = line_of(*proof, AUTHORITY, 3), [(3, CHEAT, BAD)]
    assert prove(torn + good, claims) == prove(good + torn, claims) == prove(good, claims)
    with pytest.raises(Refusal, match="proves it"):
        prove(torn, claims)


def test_one_act_proves_one_fault(proof: tuple[Any, Any], prove: Callable[..., str]) -> None:
    copies = "".join(line_of(*proof, AUTHORITY, number) for number in (3, 1, 2))
    assert prove(copies, [(3, CHEAT, BAD)]).startswith("1 faults")
    for claims in ([(number, CHEAT, BAD) for number in (1, 2, 3)], [(3, CHEAT, BAD)] * 2, [(1, CHEAT, BAD)]):
        with pytest.raises(Refusal, match="proves it"):
            prove(copies, claims)
    with pytest.raises(Refusal, match="is not the one that its evidence"):
        prove(line_of(*proof, AUTHORITY, 4), [(4, CHEAT, BAD)])


def test_a_config_that_assumes_no_collusion_convicts_nobody(tmp_path: Path) -> None:
    """One member's word about an honest one, of a suite in which more must complain than may collude."""
    cohort = cohort_of(2)
    node, liar, *_ = cohort.nodes
    terms = cohort.terms
    cohort.terms = lambda *given, **changed: terms(*given, **{"run": run_number(RUN), **changed})
    attempt, _ = CHEATS["until_checks"](cohort, 8)
    evidence = CHEATS["accusation"](attempt, node, {liar: cohort.nodes[liar].key}, {liar: bytes(PROOF_BYTES)})
    (tmp_path / "blame.jsonl").write_text(line_of(cohort, evidence, AUTHORITY, 0))
    (tmp_path / "config.yaml").write_text("secagg:\n  collusion: 0.0\n")
    result = {"data": "real", "rosters": [{"hash": cohort.roster.hash.hex()}]}
    with pytest.raises(Refusal, match="proves it"):
        require_proved(tmp_path, RUN, [(0, "hospital0", BAD)], result, [KEY])


def test_without_omegaconf_complaints_of_many_decide_nothing(
    proof: tuple[Any, Any], prove: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: Path) -> Any:
        raise ImportError("omegaconf")

    monkeypatch.setattr(blame, "read_config", missing)
    line, claims = line_of(*proof, AUTHORITY, 3), [(3, CHEAT, BAD)]
    if proof[0].suite == 2:  # hybrid
        with pytest.raises(NotShown, match=r"^0 faults .* needs OmegaConf"):
            prove(line, claims)
    else:
        assert prove(line, claims).startswith("1 faults")
    with pytest.raises(Refusal, match="proves it"):
        prove(line, [(3, CHEAT, str(Fault.WRONG_SEED))])
