"""Audit of a run, simulated or served: its terms and commitment before round 1, its alarms, its part of the result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..modes.sums import ClientMode
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.audit import sum_audit
from ..privacy.audit.alarms import Alarm
from ..privacy.audit.canary_clients import Canaries, canaries_of, commitment
from ..privacy.audit.run_audit import AuditTerms, Measured, spread_looks
from ..privacy.audit.summary import untested, visible_in
from ..privacy.budget import Adversary
from ..privacy.mechanisms.randomness import KEY_BYTES
from ..privacy.mechanisms.released_sum import ReleasedSum
from ..run.files import AUDIT_KEY, AUDIT_ROWS, AUDIT_TERMS
from ..run.observer import NO_DEMAND, Demand, Memory, Observer
from ..run.prepared_run import Run
from ..server import checkpoint, noise_key
from ..server.checkpoint import State
from ..server.rounds import Ending
from ..server.run_status import Status
from ..strategies.cohorts import invited_size, tossed_rate
from ..tasks.arrays import dimension_of, read_arrays
from ..tasks.data import held_out_of, is_tensor, placeholder, run_on
from .auditor import ACTING, Auditor
from .line import AuditLine, format_alarm, format_memorised
from .participants import canary_audit, canary_clients, is_full, support_of
from .probes import PlantedProbes, StepScores, planted_probes, step_scores
from .result import JSON_KEYS, action_of, as_json
from .settings import FullAudit, audit_of

PLOT = "audit.png"
CLEAN = "audit_clean"  # folder of the checkpoint that a rollback restores
MECHANISM = "audit"  # mechanism of its notes on the ledger
MORE_NOISE = 2.0  # factor on the planned noise after an alarm that raises it

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class RunAudit:
    """The audit of one run.

    Attributes:
      run: the audited one.
      auditor: of its releases.
      on_alarm: action on an alarm: ``note``, ``raise_noise``, ``pause``, ``rollback`` or ``stop``.
      seed: secret, of the canaries; empty without any.
      scores: of the canary records of steps; None without any.
      alarms: those of the last round on which the run acts; `observe` replaces them, and `demand` answers them.
    """

    run: Run
    auditor: Auditor
    on_alarm: str
    seed: bytes
    scores: StepScores | None = None
    alarms: list[Alarm] = field(default_factory=list[Alarm])

    @property
    def memory(self) -> Memory:
        """What the auditor remembers of sums, for a checkpoint; empty before the first."""
        memory = self.auditor.memory
        return vars(memory) if memory.before.size else {}

    @property
    def line(self) -> AuditLine:
        """The state that the log and the live display show after a round."""
        auditor, terms = self.auditor, self.auditor.terms
        memorisation = [f"{each.name}: {format_memorised(each)}" for each in auditor.memorised]
        return AuditLine(
            checked=bool(terms.delta),
            canaries=terms.canaries,
            measured=auditor.looks[-1] if auditor.looks else None,
            alarms=tuple(auditor.raised),
            memorisation=tuple(memorisation),
            probed=auditor.has_probed,
            visible=visible_in(terms, auditor.energy),
            records=auditor.record_looks[-1] if auditor.record_looks else None,
            on_alarm=self.on_alarm,
            p_values={str(test): p for test, p in auditor.p_values.items()},
            untested=untested(terms),
        )

    def resume(self, state: State, /) -> Demand:
        """Judge the rows up to a checkpoint's round again; raise noise again, or end again a run that an alarm ended."""
        memory = self.run.checkpoint.audit
        self.auditor.resume(state.round, sum_audit.Memory(**memory) if memory else sum_audit.NO_MEMORY)
        alarms = [each.alarm for each in self.auditor.raised if each.alarm.level in ACTING]
        if not alarms or self.on_alarm in ("note", "pause"):
            return NO_DEMAND
        return self._demand(state, alarms)

    def observe(self, state: State, released: ReleasedSum | None, /) -> None:
        """Audit the round that has just ended, note its alarms on the ledger, and keep those for `demand`."""
        if self.scores is not None and released is not None:
            self.scores.keep(released)
        alarms, ledger = self.auditor.take(state.round, released, state.arrays), self.run.ledger
        for alarm in alarms:
            if ledger is not None:
                fields = {"level": str(alarm.level), "p_value": alarm.p_value, "threshold": alarm.threshold}
                key = (self.run.name, state.round, f"{MECHANISM} {alarm.test}")
                ledger.note(key, {**fields, "action": action_of(self.on_alarm, alarm)})
        self.alarms[:] = [alarm for alarm in alarms if alarm.level in ACTING]

    def columns(self, number: int, /) -> dict[str, Any]:
        """Return the numbers of the last round, `number`, for its line of metrics; none if it released nothing."""
        return self.auditor.columns(number)

    def demand(self, state: State, /) -> Demand:
        """Return what the alarms of the round that has just ended demand."""
        return NO_DEMAND if self.on_alarm == "note" else self._demand(state, self.alarms)

    def _demand(self, state: State, alarms: list[Alarm]) -> Demand:
        """Return what alarms demand after a round; without any, store its model for a rollback if it is not suspicious."""
        if not alarms:
            if self.on_alarm == "rollback" and self.auditor.is_clean:
                _keep_clean(self.run, state)
            return NO_DEMAND
        texts = ", ".join(map(format_alarm, alarms))
        reason = f"an audit raised an alarm after round {state.round} ({texts})"
        match self.on_alarm:
            case "raise_noise":
                return Demand(noise=MORE_NOISE)
            case "pause":
                again = self.run.federation.population.words.unpaused
                return Demand(Ending(Status.PAUSED, f"{reason}; {again} continues regardless", state))
            case "rollback":
                clean = _last_clean(self.run, state)
                reason = f"{reason}; the model is that of round {clean.round}"
                return Demand(Ending(Status.ALARMED, reason, clean))
            case _:
                return Demand(Ending(Status.ALARMED, reason, state))

    def end(self, ending: Ending, title: str, /) -> dict[str, Any]:
        """Write the terms, with the canaries' seed unless the run may continue; draw the plot; return the audit as JSON."""
        is_over = ending.status in (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED)
        auditor = self.auditor
        summary = auditor.end(_first_model(self.run.federation), ending.state.arrays)
        write_terms(self, opened=is_over)
        if looks := auditor.looks or auditor.record_looks:
            draw_audit(looks, self.run.folder / PLOT, title)
        memorised = [
            {JSON_KEYS.get(name, name): value for name, value in asdict(result).items()}
            for result in auditor.memorised
        ]
        return as_json(auditor.terms, summary, auditor.raised, self.on_alarm) | {"memorisation": memorised}


# --- before the first round -------------------------------------------------------------------------------------


def check(federation: Federation) -> None:
    """Refuse canary records in a joint step on real records, and for a model whose input or output is not one tensor."""
    task = federation.task
    if is_full(federation.settings) and federation.mode.sums_records and not federation.simulated:
        remedy = (
            "canary records are not added to real ones; use audit=light, and audit=full on synthetic data"
        )
        raise Refusal("audit.name", "full", remedy)
    if federation.mode.extra_records:
        inputs = placeholder(held_out_of(task), 2)
        if not is_tensor(inputs):
            raise Refusal("audit", "full", "canaries need inputs that are one tensor; use audit=light")
        outputs = run_on(task.model(), inputs)
        if not hasattr(outputs, "dim"):
            raise Refusal("audit", "full", "canaries need outputs that are one tensor; use audit=light")


def begin(run: Run, fresh: bool) -> tuple[Run, Observer]:
    """Fix the terms of a run's audit and commit to its canaries on the ledger; a new run's rows begin anew.

    Args:
      run: before its first round, its folder made and its ledger open.
      fresh: whether the run is new and not resumed.

    Returns:
      The run with its canaries in the clients' settings, and its audit.

    Raises:
      Refusal: the seed of the canaries can be neither made nor read.
    """
    federation, seed, canaries = run.federation, b"", None
    full_audit = canary_audit(federation.settings)
    if full_audit is not None and federation.extra_clients:
        assert isinstance(federation.mode, ClientMode)
        seed = _seed(run, fresh)
        clients = canary_clients(
            full_audit,
            federation.mode.clients,
            federation.task,
            federation.extra_clients,
            seed,
            federation.mode.metrics,
        )
        run = replace(run, client=replace(run.client, canaries=clients))
        canaries = canaries_of(seed, clients.count, dimension_of(federation.task), clients.support)
    plants, scores = planted_probes(run), step_scores(run)
    terms = _terms(federation, canaries, plants)
    terms = replace(terms, arms=run.tuning.arms, in_arms=run.tuning.last)
    if run.privacy is not None:
        terms = replace(terms, filter_order=run.privacy.plan.filter_order)
    auditor = Auditor(terms, run.folder / AUDIT_ROWS, probes=plants.probes, record_probe=plants.records)
    ledger = run.ledger
    if ledger is not None and terms.delta:
        # Both sides of the test of the books use the grid of GATE_INTERVAL, as the metrics line does.
        auditor.booked = lambda: ledger.epsilon(terms.delta, GATE_INTERVAL)
        # A ledger of real data holds earlier runs, whose cost would hide missing entries of this one.
        if (fresh or run.checkpoint.run not in ("", run.name)) and terms.arms == 1:
            auditor.prior, auditor.start_round = ledger.events(Adversary.MODEL), run.checkpoint.state.round
    if canaries is not None:
        auditor.directions, auditor.coins = canaries.directions, canaries.coins
    audit = RunAudit(run, auditor, audit_of(federation.settings).on_alarm, seed, scores)
    if fresh:
        (run.folder / AUDIT_ROWS).unlink(missing_ok=True)
    if fresh and scores is not None:
        scores.begin()
    if fresh and seed:
        write_terms(audit)
    _commit(audit)
    return run, audit


def _seed(run: Run, fresh: bool) -> bytes:
    """Return the canaries' secret seed: derived from a seeded run's seed, else drawn once and kept in its folder."""
    if run.federation.seed is not None:
        return run.federation.randomness.stream("canaries").bytes(KEY_BYTES)
    return noise_key.make(run.folder, AUDIT_KEY) if fresh else noise_key.read(run.folder, AUDIT_KEY)


def _terms(federation: Federation, canaries: Canaries | None, plants: PlantedProbes) -> AuditTerms:
    """Return the terms of an audit that the configuration fixes, all public; `begin` adds the arms and the filter."""
    settings, audit, mode = federation.settings, audit_of(federation.settings), federation.mode
    dimension, clients = dimension_of(federation.task), federation.declared_clients
    terms = AuditTerms(
        settings.steps,
        audit.alpha,
        dimension=dimension,
        probed=plants.probed,
        records=plants.records is not None,
        losses=plants.losses,
        record_epsilon=plants.budget.target_epsilon if plants.budget else 0.0,
        own_noise="" if mode.client_budget is None else str(mode.client_budget.unit),
    )
    if isinstance(audit, FullAudit):
        terms = replace(terms, looks=spread_looks(audit.looks, settings.num_rounds))
    if mode.budget is not None:
        sums = mode.promises[0]
        terms = replace(
            terms, delta=sums.target_delta, adjacency=sums.adjacency, of_unit=mode.records_of_unit
        )
        # The claim relies on a secret draw from these clients, which `Check.DRAW` then tests.
        if tossed_rate(federation.cohort) < 1:
            terms = replace(terms, clients=clients)
    if canaries is None or not isinstance(audit, FullAudit):
        return terms
    return replace(
        terms,
        canaries=len(canaries.coins),
        support=support_of(audit, dimension),
        rate=min(1.0, invited_size(federation.cohort, clients) / clients),
    )


def write_terms(audit: RunAudit, opened: bool = False) -> None:
    """Write the fixed terms and the commitment.

    Args:
      audit: of the run.
      opened: also write the seed and the coins, with which anybody can check the commitment.
    """
    auditor, seed = audit.auditor, audit.seed
    fields: dict[str, Any] = {"terms": asdict(auditor.terms), "on_alarm": audit.on_alarm}
    if seed:
        fields["commitment"] = commitment(seed, auditor.coins)
        if opened:
            fields["opened"] = {"seed": seed.hex(), "coins": np.packbits(auditor.coins).tobytes().hex()}
    replace_file(audit.run.folder / AUDIT_TERMS, (json.dumps(fields, indent=2) + "\n").encode(), mode=None)


def _commit(audit: RunAudit) -> None:
    """Note the commitment on the run's ledger as the run begins; do nothing without canaries or a ledger."""
    run, auditor = audit.run, audit.auditor
    if not audit.seed or run.ledger is None:
        return
    fields = {"commitment": commitment(audit.seed, auditor.coins), "canaries": len(auditor.coins)}
    run.ledger.note((run.name, 0, MECHANISM), fields)


# --- the clean model ---------------------------------------------------------------------------------------------


def _keep_clean(run: Run, state: State) -> None:
    """Write the model after a round without suspicion, for a rollback."""
    folder = run.folder / CLEAN
    folder.mkdir(exist_ok=True)
    checkpoint.write(folder, checkpoint.Checkpoint(run.name, State(state.round, state.arrays, {})))


def _first_model(federation: Federation) -> Arrays:
    """Return the averaged arrays of the first model, against which `Auditor.end` measures the final one; or none.

    They are empty where canaries move no model: without any, and in a deployment, which subtracts them from each sum.
    """
    if not federation.extra_clients or not federation.population.reads_data:
        return {}
    arrays = read_arrays(federation.task.model())
    return {name: value for name, value in arrays.items() if value.dtype.kind == "f"}


def _last_clean(run: Run, state: State) -> State:
    """Return `state` with model and round of the last round without suspicion, else with the first model and round 0."""
    clean = checkpoint.read(run.folder / CLEAN)
    if clean is None:
        return State(0, read_arrays(run.federation.task.model()), state.strategy, state.choices)
    model = {name: clean.state.arrays[name] for name in state.arrays}
    return State(clean.state.round, model, state.strategy, state.choices)


CLAIMED, MEASURED, CEILING = "#c1440e", "#1b6ca8", "#777777"  # colours of the plot
HEADROOM = 1.6  # above the largest relevant number; a ceiling may lie outside the picture


def draw_audit(looks: Sequence[Measured], path: Path, title: str) -> None:
    """Write an audit's measurements as a PNG: claimed epsilon, measured with its interval, and the ceiling.

    Args:
      looks: at least one, in the order of their rounds.
      path: of the picture.
      title: one line above it.
    """
    from matplotlib.figure import Figure

    rounds = [each.round for each in looks]
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    top = HEADROOM * max(
        value for each in looks for value in (each.claimed, each.high) if math.isfinite(value)
    )
    claimed = [each.claimed for each in looks]
    axes.plot(rounds, claimed, color=CLAIMED, marker="o", ms=3, label="claimed, at most")
    epsilons = [min(each.epsilon, top) for each in looks]
    errors = [
        [value - min(each.low, top) for value, each in zip(epsilons, looks, strict=True)],
        [min(each.high, top) - value for value, each in zip(epsilons, looks, strict=True)],
    ]
    style: dict[str, Any] = {
        "color": MEASURED,
        "marker": "s",
        "ms": 4,
        "lw": 0,
        "elinewidth": 1.2,
        "capsize": 3,
    }
    axes.errorbar(rounds, epsilons, errors, label="measured by canaries, 95 %", **style)
    ceiling = [min(each.ceiling, 2 * top) for each in looks]
    axes.plot(rounds, ceiling, color=CEILING, linestyle="--", label="could have been shown")
    blind = [each.ceiling <= each.claimed for each in looks]
    style = {"color": CEILING, "alpha": 0.12, "lw": 0, "step": "mid"}
    axes.fill_between(rounds, 0, top, where=blind, label="too weak to tell", **style)
    axes.set(xlabel="round", ylabel="epsilon", ylim=(0, top))
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
