"""Faults put into a copy of the package on purpose: the suite must go red for every one of them."""

import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "privacy",
    "tasks",
    "strategies",
    "configs",
    "reports",
    "links",
    "client",
    "server",
    "simulations",
    "deployment",
    "cli",
)


@dataclass(frozen=True)
class Mutation:
    """One change to one file, and the tests of which at least one must fail."""

    file: str
    before: str
    after: str
    tests: str
    select: str


GRID_TESTS, SUM_TESTS = "test_server_private_grid.py", "test_privacy_private_sum.py"
AUDIT_TESTS = "test_privacy_audit_bounds.py"
COMPRESSION_TESTS = "test_privacy_compression.py"
ANSWERS_TESTS = "test_server_answers.py"
BUNDLE_TESTS, PROVISION_TESTS = "test_deployment_bundles.py", "test_deployment_provision.py"
BINDING_TESTS, BUNDLED_TESTS = "test_server_binding.py", "test_server_bundle.py"
ACTS_TESTS, SEGMENT_TESTS = "test_server_acts.py", "test_privacy_segments.py"
MUTATIONS = {
    "a student learns of clients' data": Mutation(
        "server/run/distil.py",
        "and own <= known for client in clients",
        "and own < set() for client in clients",
        "test_server_export.py",
        "none_of_the_clients",
    ),
    "a report takes a string for markup": Mutation(
        "reports/page.py",
        "        autoescape=True,",
        "        autoescape=False,",
        "test_reports_content.py",
        "no_string_becomes_markup",
    ),
    "a promised epsilon is rounded down": Mutation(
        "reports/shown.py",
        "math.ceil(round(float(value) * scale, 6))",
        "math.floor(round(float(value) * scale, 6))",
        "test_reports_shown.py",
        "never_shown_smaller",
    ),
    "a report of files that were changed does not say so": Mutation(
        "reports/run_files.py",
        "    return [name for name in READ if name in named and _hash(folder / name) != named[name]]",
        "    return []",
        "test_reports_content.py",
        "held_against_its_close",
    ),
    "verify looks at no signature": Mutation(
        "server/binding/signatures.py",
        "    for number, each in enumerate(signatures):\n        text = message(",
        "    for number, each in enumerate(signatures[:0]):\n        text = message(",
        BUNDLED_TESTS,
        "both_algorithms",
    ),
    "a signature is not over those before it": Mutation(
        "server/binding/signatures.py",
        '"before": [each.to_json() for each in before]',
        '"before": []',
        BUNDLED_TESTS,
        "its_bundle_hold",
    ),
    "verify looks at no hash of a bundle": Mutation(
        "server/binding/verify.py",
        "not path.is_file() or sha256_of(path) != digest:",
        "not path.is_file():",
        BUNDLED_TESTS,
        "does_not_hold",
    ),
    "verify takes a file more": Mutation(
        "server/binding/verify.py",
        "for name in sorted(there ^ set(listed)):",
        "for name in sorted(set(listed) - there):",
        BUNDLED_TESTS,
        "no_file_more",
    ),
    "a manifest names what lies outside its folder": Mutation(
        "server/binding/manifest.py",
        'if name in ("", "..") or Path(name).name != name:',
        'if name in ("", ".."):',
        BINDING_TESTS,
        "names_nothing_outside",
    ),
    "a run that goes on claims of a trusted server what others have seen": Mutation(
        "reports/so_far.py",
        "        if who not in seen:",
        "        if who not in book.spent:",
        "test_reports_content.py",
        "trusted_server_sees_all",
    ),
    "verify takes a manifest that the ledger does not bind": Mutation(
        "server/binding/verify.py",
        'if said["manifest"] != held.manifest.hash:',
        "if False:",
        BUNDLED_TESTS,
        "than_the_close_knows",
    ),
    "verify believes the epsilon of a result": Mutation(
        "server/binding/verify.py",
        "if book.filter_order is None and not _same(found, claimed):",
        "if False:",
        BUNDLED_TESTS,
        "larger",
    ),
    "verify believes the epsilon of a round": Mutation(
        "server/binding/verify.py",
        "if not _same(known[key], _number(row[column])):",
        "if False:",
        BUNDLED_TESTS,
        "allows_is_recomputed",
    ),
    "verify believes the verdict of an audit": Mutation(
        "server/binding/verify.py",
        "        if not _alike(value, told.get(name)):\n",
        "        if False:\n",
        BUNDLED_TESTS,
        "verdict",
    ),
    "verify believes the page": Mutation(
        "server/binding/verify.py",
        '    if wrong:\n        raise Wrong(f"{len(wrong)} values',
        '    if False:\n        raise Wrong(f"{len(wrong)} values',
        BUNDLED_TESTS,
        "where_every_hash_fits",
    ),
    "verify does not look for a known head": Mutation(
        "server/binding/verify.py",
        '+ ([("you", head)] if head else [])',
        "",
        BUNDLED_TESTS,
        "known_head",
    ),
    "what was overdrawn before the budget grew is not found": Mutation(
        "privacy/ledger/book.py",
        "            granted = asked or granted\n",
        "",
        BUNDLED_TESTS,
        "overdrawn_and",
    ),
    "a refusal leaves no entry": Mutation(
        "server/run/acts.py",
        "if ending.status is Status.EXHAUSTED and run.ledger is not None and run.ledger.is_open:",
        "if False:",
        ACTS_TESTS,
        "refusal_is_an_entry",
    ),
    "an alarm is overridden by nobody": Mutation(
        "server/run/acts.py",
        'if any(each.get("action") == PAUSE for each in ledger.noted(earlier, number)):',
        "if False:",
        ACTS_TESTS,
        "despite_an_alarm",
    ),
    "what a release is for is forgotten": Mutation(
        "privacy/ledger/ledger.py",
        'told = {"purpose": purpose, "segments"',
        'told = {"purpose": None, "segments"',
        ACTS_TESTS,
        "newest_run_first",
    ),
    "the ledger does not say what a vector holds": Mutation(
        "privacy/ledger/ledger.py",
        '"segments": release.segments, "kind"',
        '"segments": None, "kind"',
        SEGMENT_TESTS,
        "lists_the_segments",
    ),
    "a segment is not clipped": Mutation(
        "privacy/mechanisms/private_sum.py",
        "(spec.clip(segment) / max(norm, segment.bound))",
        "(spec.clip(segment) / segment.bound)",
        SEGMENT_TESTS,
        "shortened",
    ),
    "a run that failed is not closed": Mutation(
        "server/run/close.py",
        "CLOSED = (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED, Status.FAILED)",
        "CLOSED = (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED)",
        BINDING_TESTS,
        "failed_closes",
    ),
    "a run goes on after its close and counts as closed": Mutation(
        "privacy/ledger/book.py",
        "        if self.closes:\n",
        "        if False:\n",
        BINDING_TESTS,
        "who_went_on",
    ),
    "no example of a person is left out": Mutation(
        "tasks/persons.py",
        "if sum(map(len, rows.values())) == len(data) and all(len(own) <= most for own in rows.values()):",
        "if True:",
        "test_client_persons.py",
        "at_most_so_many or moves_a_sum",
    ),
    "a person is charged what one example costs": Mutation(
        "strategies/record_plan.py",
        "of_unit=record.per_person or 1,",
        "of_unit=1,",
        "test_client_persons.py",
        "promises_per_person",
    ),
    "a person's examples in the sum of all are charged as one": Mutation(
        "server/run/federation.py",
        "return (self.per_person or 1) * (1 if self.together is None else self.clients_per_person or 1)",
        "return 1",
        "test_client_persons.py",
        "counts_a_persons",
    ),
    "a person at two clients is released in two sums and charged for one": Mutation(
        "server/masked_sums.py",
        "if not self._account.splits:",
        "if False:",
        "test_server_culprit_search.py",
        "in_one_sum",
    ),
    "a policy bounds no norm of a record in a masked sum": Mutation(
        "client/device/order_policy.py",
        "norm = spec.unit_norm or spec.clipping_norm",
        "norm = policy.maximum_clipping_norm",
        "test_client_device.py",
        "policy_bounds",
    ),
    "a device charges a person at two clients as at one": Mutation(
        "strategies/training_order.py",
        "return (self.per_person or 1) * (self.clients_per_person or 1)",
        "return self.per_person or 1",
        "test_strategies_training_order.py",
        "several_clients",
    ),
    "every client trains on a person that two may": Mutation(
        "tasks/persons.py",
        "    if owners is not None:\n",
        "    if False:\n",
        "test_client_persons.py",
        "clients_that_may",
    ),
    "a ledger of records goes on as one of persons": Mutation(
        "privacy/ledger/book.py",
        "if found in BOUNDS and wanted in BOUNDS and found != wanted:",
        "if False:",
        "test_client_persons.py",
        "counted_by_record",
    ),
    "a protected app measures private held-out data": Mutation(
        "server/protect.py",
        'evaluate_fn is not None and held_out == "private"',
        "False",
        "test_server_protect.py",
        "only_if_they_are_public",
    ),
    "two modes charge the same records at once": Mutation(
        "server/run/prepare.py",
        "    _claim_records(run.federation)",
        "    pass",
        "test_client_together.py",
        "two_budgets",
    ),
    "a task keeps one optimizer for all clients": Mutation(
        "tasks/optimizers.py",
        "id(parameter) not in given for",
        "False for",
        "test_client_optimizers.py",
        "cannot_train",
    ),
    "a hidden client tells that it has no examples": Mutation(
        "client/app.py",
        "    if sum_spec_of(message.content).clipping_norm is None:\n",
        "    if True:\n",
        "test_client_without_examples.py",
        "as_a_blanked_one",
    ),
    "a loss is measured on the classes of a few examples": Mutation(
        "tasks/independence.py",
        "for targets in _of_every_class(calm, probe.targets):",
        "for targets in ():",
        "test_tasks_independence.py",
        "of_one_class",
    ),
    "clients of one process are not held apart": Mutation(
        "simulations/simulate.py",
        "        _check_clients_apart(federation)\n",
        "",
        "test_preconditions.py",
        "carries_one_client",
    ),
    "records of the first client alone are measured": Mutation(
        "server/run/prepare.py",
        "if federation.simulated or federation.deployed is not None:\n        return [some_examples",
        "if True:\n        return [some_examples",
        "test_preconditions.py",
        "records_of_each_client",
    ),
    "an adopted ledger does not say which mode charged it": Mutation(
        "privacy/ledger/data_sets.py",
        '    for old in known.adopted:\n        if _named(old, ""):',
        '    for old in ():\n        if _named(old, ""):',
        "test_client_together.py",
        "carried_over",
    ),
    "real data without a name are all one data set": Mutation(
        "server/run/federation.py",
        'raise Refusal("task.data_id", None, remedy)',
        'return "data"',
        "test_preconditions.py",
        "without_a_name",
    ),
    "the same real records pay from two budgets": Mutation(
        "privacy/ledger/data_sets.py",
        "for other in sorted(_charged_by(known) - {mode}):",
        "for other in ():",
        "test_client_together.py",
        "two_budgets",
    ),
    "what a layer writes reaches the next part of a step": Mutation(
        "client/dp_sgd/train.py",
        "_clip(torch.from_numpy(rows), clipped_sums, optimizer)\n        _put_back(model, buffers)",
        "_clip(torch.from_numpy(rows), clipped_sums, optimizer)",
        "test_client_together.py",
        "what_a_layer_writes",
    ),
    "the same cohort in every round": Mutation(
        "server/private_grid.py",
        'stream("cohort", number), earlier[: number - 1])',
        'stream("cohort", 0), earlier)',
        GRID_TESTS,
        "cohort_of_its_own",
    ),
    "a client takes the noise of another size": Mutation(
        "strategies/client_settings.py",
        "in self.noise_by_records if least <= records]",
        "in self.noise_by_records]",
        "test_client_dp_sgd.py",
        "no_more_records",
    ),
    "a client takes the noise of another's ledger": Mutation(
        "strategies/client_settings.py",
        "dict(self.noise_by_ledger).get(name)",
        "min(dict(self.noise_by_ledger).values(), default=None)",
        "test_client_dp_sgd.py",
        "no_more_records",
    ),
    "the gate's look-ahead covers less noise": Mutation(
        "privacy/accounting/gate.py",
        "mine[0] <= others[0] and mine[1] >= others[1]",
        "mine[0] <= others[0]",
        "test_privacy_accounting.py",
        "looked_ahead",
    ),
    "the gate's look-ahead covers larger samples": Mutation(
        "privacy/accounting/gate.py",
        "mine[0] <= others[0] and mine[1] >= others[1]",
        "mine[1] >= others[1]",
        "test_privacy_accounting.py",
        "looked_ahead",
    ),
    "the trade-off of errors knows one side of a loss": Mutation(
        "privacy/accounting/loss_distributions.py",
        "sizes) for pmf in (pair._pmf_remove, pair._pmf_add)]",
        "sizes) for pmf in (pair._pmf_add,)]",
        "test_privacy_curve.py",
        "no_test_between",
    ),
    "a curve is that of the client who lost least": Mutation(
        "privacy/accounting/curve.py",
        "[max(points) for points",
        "[min(points) for points",
        "test_privacy_curve.py",
        "several_units",
    ),
    "mu forgets that a unit is replaced": Mutation(
        "privacy/accounting/curve.py",
        "distance = 2 if adjacency is Adjacency.REPLACE_ONE else 1",
        "distance = 1",
        "test_privacy_curve.py",
        "analytic_curve",
    ),
    "a device's closed form forgets that a unit is replaced": Mutation(
        "privacy/accounting/gaussian.py",
        "distance = 2 if adjacency is Adjacency.REPLACE_ONE else 1",
        "distance = 1",
        "test_privacy_gaussian.py",
        "loss_distribution_says",
    ),
    "a nested sample forgets that its unit may be absent": Mutation(
        "privacy/accounting/loss_distributions.py",
        "masses = rate * upper + (1 - rate) * lower",
        "masses = rate * upper",
        "test_privacy_nested.py",
        "test",
    ),
    "an adaptive ledger's budget is taken for that of another delta": Mutation(
        "privacy/accounting/renyi_filter.py",
        "return max(0.0, float(room - _room(0.0, delta)[at]))",
        "return budget.target_epsilon",
        "test_privacy_curve.py",
        "filter_promises",
    ),
    "private held-out data are evaluated": Mutation(
        "server/run/run.py",
        "if not federation.held_out_public:",
        "if False:",
        "test_end_to_end_run.py",
        "may_call_its",
    ),
    "a device trains by another schema than the server's": Mutation(
        "client/device/device.py",
        "if order.agreement != agreement:",
        "if order.agreement == 0:",
        "test_deployment_tables.py",
        "another_schema_or_model",
    ),
    "real tables are measured on their clients' rows": Mutation(
        "tasks/tables.py",
        "    if not simulated:\n        return Tables(",
        "    if False:\n        return Tables(",
        "test_tasks_tables.py",
        "separators or one_hot",
    ),
    "a schema is inferred from real tables": Mutation(
        "tasks/tables.py",
        "    if not simulated:\n        remedy = (",
        "    if False:\n        remedy = (",
        "test_tasks_tables.py",
        "real_tables_need",
    ),
    "an optimizer reads gradients before their noise": Mutation(
        "client/dp_sgd/train.py",
        "parameter.grad = noised",
        "parameter.grad = parameter.summed_grad / (self.expected_batch_size or 1)",
        "test_client_optimizers.py",
        "steps_as_opacus_own",
    ),
    "an optimizer carries one client's state to the next": Mutation(
        "client/training/sgd.py",
        "optimizer = optimizer_of(task, values, training)",
        'optimizer = task.__dict__.setdefault("kept", optimizer_of(task, values, training))',
        "test_client_optimizers.py",
        "torchs_own_class and place and adam",
    ),
    "rounding left out of what a record moves": Mutation(
        "privacy/mechanisms/sum_spec.py",
        "self.unit_norm / self.step + math.sqrt(coordinates)",
        "self.unit_norm / self.step",
        "test_client_together.py",
        "no_more_than or rounding_moves",
    ),
    "a masked sum of records is rounded to the nearest": Mutation(
        "privacy/mechanisms/distributed.py",
        "else round_once(vector, stream)",
        "else np.rint(vector).astype(np.int32)",
        "test_client_together.py",
        "rounded_by_coins",
    ),
    "rounding by coins is free": Mutation(
        "privacy/mechanisms/rounding.py",
        "norm**2 + coordinates / 4",
        "norm**2",
        "test_client_together.py",
        "rounded_by_coins",
    ),
    "a vector of records is pulled back after it is rounded": Mutation(
        "privacy/mechanisms/sum_spec.py",
        "if self.unit_norm is not None:\n            return max",
        "if False:\n            return max",
        "test_client_together.py",
        "never_pulled_back",
    ),
    "an answer tells how many records were drawn": Mutation(
        "client/app.py",
        '"metrics": MetricRecord({})})\n    return Message(content',
        '"metrics": MetricRecord({"drawn": len(rows)})})\n    return Message(content',
        "test_client_together.py",
        "tells_how_many",
    ),
    "records drawn once for all rounds": Mutation(
        "client/dp_sgd/union.py",
        'stream("batches", number, client)',
        'stream("batches", 0, client)',
        "test_client_together.py",
        "draws_anew",
    ),
    "a client's records drawn once for all rounds": Mutation(
        "client/app.py",
        'rows = drawn(len(data), terms, randomness.stream("batches", number, client))',
        'rows = drawn(len(data), terms, randomness.stream("batches", 0, client))',
        "test_client_together.py",
        "drawn_like_all",
    ),
    "a colluder's share of the noise is counted": Mutation(
        "privacy/mechanisms/distributed.py",
        "noise_multiplier(survivors - attendance.colluders, survivors)",
        "noise_multiplier(survivors, survivors)",
        "test_client_together.py",
        "never_below_what_the_event_says",
    ),
    "noise of absent clients is counted": Mutation(
        "privacy/mechanisms/distributed.py",
        "noise_multiplier(survivors - attendance.colluders, survivors)",
        "noise_multiplier(attendance.most - attendance.colluders, survivors)",
        "test_client_together.py",
        "never_below_what_the_event_says",
    ),
    "an average holds other models than those released last": Mutation(
        "server/rounds.py",
        "average = _with(average, merged)",
        "average = _with(average, state.arrays)",
        "test_server_callbacks.py",
        "average_is_of_the_last_released",
    ),
    "a canary record is read beside the sum of another's": Mutation(
        "client/app.py",
        "asked.coins[first : first + asked.each], first + 1)",
        "asked.coins[first : first + asked.each], 1)",
        "test_client_together.py",
        "drawn_like_all",
    ),
    "records drawn more often than is accounted": Mutation(
        "server/run/sum_plan.py",
        "PoissonBatches(together.sample_rate, 1,",
        "PoissonBatches(together.sample_rate / 2, 1,",
        "test_client_together.py",
        "plan_costs or charges_its_ledger",
    ),
    "several local steps on a share of the noise": Mutation(
        "configs/schema.py",
        "if self.training.local_epochs != 1:",
        "if False:",
        "test_client_together.py",
        "refused_by_name",
    ),
    "noise in norms of a record, whatever rounding adds": Mutation(
        "privacy/mechanisms/private_sum.py",
        "noise_multiplier * spec.sensitivity(total.size)",
        "noise_multiplier * (spec.unit_norm or spec.clipping_norm) / spec.step",
        "test_client_together.py",
        "noise_is_measured",
    ),
    "text passes for a number in a configuration": Mutation(
        "configs/group.py",
        "ConfigDict(strict=True,",
        "ConfigDict(strict=False,",
        "test_configs_bad_input.py",
        "bad_value",
    ),
    "rules between keys of a configuration are not looked at": Mutation(
        "configs/group.py",
        "if broken := tuple(self.rules()):",
        "if broken := ():",
        "test_configs_models.py",
        "rules_between_keys",
    ),
    "gRPC is given another certificate at once": Mutation(
        "links/grpc/grid.py",
        "time.sleep(RENEWAL_SECONDS)",
        "pass",
        "test_server_link_grid.py",
        "certificate_again_only",
    ),
    "an operator's call passes the front": Mutation(
        "links/flower/tls_front.py",
        "not in FLEET_PATHS:",
        'in ("/",):',
        "test_server_front.py",
        "no_call_of_an_operator",
    ),
    "the front takes whoever signs": Mutation(
        "links/flower/fleet_calls.py",
        "if not verify_signature(",
        "if verify_signature is None and not verify_signature(",
        "test_server_front.py",
        "a_signature_is_of_the_time",
    ),
    "a body in pieces has no bound": Mutation(
        "links/flower/tls_front.py",
        "if taken > MOST_BODY_BYTES or (",
        "if (",
        "test_server_front.py",
        "too_large_is_refused",
    ),
    "a question over Flower's link is done twice": Mutation(
        "links/device_answers.py",
        "if name in begun:",
        "if False:",
        "test_client_fleet.py",
        "begun_before_a_restart",
    ),
    "a bundle of another authority is used": Mutation(
        "configs/bundle_files.py",
        "own.verify_directly_issued_by(authority)",
        "pass",
        BUNDLE_TESTS,
        "a_client_refuses_a_bundle_that_is_not_whole",
    ),
    "a client takes an older roster": Mutation(
        "client/device/client_bundle.py",
        "if roster.version <= bundle.identity.roster.version:",
        "if False:",
        PROVISION_TESTS,
        "never_an_older",
    ),
    "a running server takes an older roster": Mutation(
        "links/roster_watch.py",
        "if roster.version <= held[0].version:",
        "if False:",
        "test_server_following.py",
        "an_older_one_never",
    ),
    "a list admits whom the roster has left out": Mutation(
        "links/roster_watch.py",
        "if node in known",
        "",
        "test_server_following.py",
        "whatever_the_list_says",
    ),
    "a round goes by the roster that the run began with": Mutation(
        "server/run/run.py",
        "or _renewed(progress, private, around)",
        "",
        "test_deployment_serve.py",
        "from_the_next_round_on and central",
    ),
    "a sum is prepared under a roster that is over": Mutation(
        "server/secure_sum.py",
        " and self._roster == masking.roster.hash",
        "",
        "test_server_secure_sum.py",
        "prepared_under",
    ),
    "a message may be as deep as it likes": Mutation(
        "privacy/bounded_decoding.py",
        "if len(due) > bounds.depth:",
        "if False:",
        "test_privacy_bounded_decoding.py",
        "bombs_lies",
    ),
    "text may be as deep as it likes": Mutation(
        "privacy/bounded_decoding.py",
        "if depth > JSON_DEPTH:",
        "if False:",
        "test_privacy_bounded_decoding.py",
        "deep_double",
    ),
    "strangers take a server's last open file": Mutation(
        "links/open_files.py",
        "if connection.fileno() >= min(for_connections(), MOST_TLS):",
        "if False:",
        "test_server_open_files.py",
        "prometheus_text",
    ),
    "a policy that others may change is taken": Mutation(
        "configs/bundle_files.py",
        "if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):",
        "if False:",
        "test_deployment_bundles.py",
        "nobodys_word",
    ),
    "a run does not tell that its members changed": Mutation(
        "server/run/run.py",
        "        note_roster(progress.run.folder, federation.deployed.roster, progress.state.round + 1)\n",
        "",
        "test_deployment_serve.py",
        "is_new_is_so",
    ),
    "a roster counts that too few members have signed": Mutation(
        "client/device/roster_changes.py",
        "    if len(names) >= demands.cosigned:\n",
        "    if True:\n",
        "test_client_rosters.py",
        "too_few_members_signed",
    ),
    "whoever signs a roster has vouched for it": Mutation(
        "privacy/secagg/roster.py",
        "        verify(public, _COSIGNED, roster.hash, signature)\n",
        "        pass\n",
        "test_client_rosters.py",
        "another_one_do_not_count",
    ),
    "a device follows a log that forks": Mutation(
        "client/device/seen_log.py",
        "        if frontier.root.hex() != head.root:\n            self._forked(told, head)\n        return grown",
        "        return grown",
        "test_links_server_log.py",
        "held_against_the_log",
    ),
    "a device forgets which leaves it has seen": Mutation(
        "client/device/seen_log.py",
        "        if list(told.leaves[: shared - told.start]) != self.leaves[told.start : shared]:\n",
        "        if False:\n",
        "test_links_server_log.py",
        "two_stories",
    ),
    "a model that the log does not hold is trained on": Mutation(
        "client/device/seen_log.py",
        "            if not held:\n",
        "            if False:\n",
        "test_links_server_log.py",
        "held_against_the_log",
    ),
    "anybody signs the head of a log": Mutation(
        "links/tree_head.py",
        "        key.verify(bytes.fromhex(head.signature), head.told, ECDSA(SHA256()))\n",
        "        key.public_numbers()\n",
        "test_links_server_log.py",
        "own_signature_alone",
    ),
    "a client's certificate signs the head of a log": Mutation(
        "links/tree_head.py",
        "        if named != [[federation], [SERVER]] or head.federation != federation:\n",
        "        if head.federation != federation:\n",
        "test_links_server_log.py",
        "own_signature_alone",
    ),
    "a server that stops telling its log is followed": Mutation(
        "client/device/device.py",
        "            elif own.policy.require_log or self._log.head is not None:\n",
        "            elif False:\n",
        "test_links_server_log.py",
        "never_content_without",
    ),
    "a proof of consistency shows the newer tree alone": Mutation(
        "privacy/merkle.py",
        "    return last == 0 and old == first and new == second\n",
        "    return last == 0 and new == second\n",
        "test_privacy_merkle.py",
        "what_is_so",
    ),
    "a question of another head is another question": Mutation(
        "links/grpc/message_codec.py",
        "    asked = (body.asked or body).digest\n",
        "    asked = body.digest\n",
        "test_links_server_log.py",
        "no_part_of_what",
    ),
    "a device takes a roster that forks": Mutation(
        "client/device/roster_changes.py",
        "if not new.follows(old):",
        "if False:",
        "test_client_rosters.py",
        "two_rosters_of_one_version",
    ),
    "a device installs names that are bound to no bytes": Mutation(
        "deployment/requirements.py",
        "if not HASHES.search(line)), None)",
        "if not line), None)",
        PROVISION_TESTS,
        "unverified_code_needs_a_word",
    ),
    "a lock may name what is bound to no bytes": Mutation(
        "deployment/requirements.py",
        "    if (line := unverified(text)) is not None:",
        "    if (line := unverified(text)) is None:",
        "test_deployment_device_files.py",
        "binds_no_bytes",
    ),
    "a server takes a roster that forks": Mutation(
        "links/roster_watch.py",
        "if not roster.follows(held[0]):",
        "if False:",
        "test_client_rosters.py",
        "two_rosters_of_one_version",
    ),
    "a changed roster does not wait for its owner": Mutation(
        "client/device/roster_changes.py",
        "if not short and demands.approval and _approved(state) != change.hash:",
        "if False:",
        "test_client_rosters.py",
        "wait_for_their_owner",
    ),
    "a cohort without the owner's peers is joined": Mutation(
        "client/secure_update.py",
        "if here < policy.peers_at_least:",
        "if False:",
        "test_client_rosters.py",
        "too_few_peers",
    ),
    "members that nobody vouches for are believed": Mutation(
        "client/secure_update.py",
        "            if noise.sigma:\n",
        "            if False:\n",
        "test_client_rosters.py",
        "nobody_vouches",
    ),
    "a door that is open to all of a machine": Mutation(
        "links/flower/loopback_door.py",
        "!= os.geteuid()",
        "== -1",
        "test_server_own_door.py",
        "another_user",
    ),
    "records are trained without measuring that they are apart": Mutation(
        "server/run/prepare.py",
        "            check_independence(federation.task.model(), federation.task, data)\n",
        "            pass\n",
        "test_preconditions.py",
        "leak or mixes",
    ),
    "a collate function that mixes examples passes": Mutation(
        "tasks/independence.py",
        "if isinstance(data, LazyExamples) and data.collate is not None:",
        "if False:",
        "test_client_data.py",
        "a_collate_that_mixes",
    ),
    "clients' data are not looked at before round 1": Mutation(
        "server/run/prepare.py",
        '            check_data(data_of(task, client), f"client {client}", held_out)\n',
        "            pass\n",
        "test_client_data.py",
        "make_no_batch",
    ),
    "clip skipped one by one": Mutation(
        "client/dp_sgd/train.py",
        "alpha=min(1.0, optimizer.max_grad_norm / (norm + 1e-6))",
        "alpha=1.0",
        "test_client_dp_sgd.py",
        "one_by_one",
    ),
    "a dimension as long as the batch is taken for it": Mutation(
        "client/dp_sgd/train.py",
        "for size in (2, 3)]",
        "for size in (2, 2)]",
        "test_client_dp_sgd.py",
        "as_long_as_the_batch",
    ),
    "arguments of one's own task are not checked": Mutation(
        "tasks/__init__.py",
        "        _check_arguments(name, make, own)\n",
        "        pass\n",
        "test_tasks_arguments.py",
        "do_not_fit",
    ),
    "a loss is not measured": Mutation(
        "tasks/independence.py",
        "_check_loss, _check_gradients",
        "_check_gradients",
        "test_tasks_independence.py",
        "class_weights or ranking",
    ),
    "a loss that stands alone is measured on one batch": Mutation(
        "tasks/independence.py",
        "if len(leaves(calm)) == 1:",
        "if False:",
        "test_tasks_independence.py",
        "odd_example",
    ),
    "what a step leaves behind is not looked at": Mutation(
        "tasks/independence.py",
        "_check_gradients, _check_state)",
        "_check_gradients)",
        "test_tasks_independence.py",
        "attribute or history or not_used",
    ),
    "a model remembers one client for the next": Mutation(
        "tasks/arrays.py",
        "        for where, names, values in kept:\n",
        "        for where, names, values in []:\n",
        "test_preconditions.py",
        "remembers",
    ),
    "protect accepts any delta": Mutation(
        "server/protect.py",
        'return check_delta("", budget.target_delta, population, "clients", allow_large_delta)',
        'return check_delta("", budget.target_delta, population, "clients", True)',
        "test_server_protect.py",
        "what_the_command_line_refuses",
    ),
    "protect accepts an adjacency that its population contradicts": Mutation(
        "server/protect.py",
        '    check_adjacency("budget.adjacency", budget.adjacency, told)\n',
        "    _ = told\n",
        "test_server_protect.py",
        "what_the_command_line_refuses",
    ),
    "a ledger of protect lies where the process works": Mutation(
        "privacy/ledger/caps.py",
        "    if not folder.is_absolute():",
        "    if False:",
        "test_server_protect.py",
        "what_the_command_line_refuses",
    ),
    "protect forgets the cap of whoever owns the data": Mutation(
        "server/protect.py",
        "    budget = capped(path, budget)\n",
        "",
        "test_server_protect.py",
        "a_cap_of_the_owner",
    ),
    "protect tells how many were drawn in secret": Mutation(
        "server/protect.py",
        "        if tossed_rate(participants.cohort) < 1:\n            took_part",
        "        if False:\n            took_part",
        "test_server_protect.py",
        "secret_draw",
    ),
    "protect pays for rounds that nobody answers": Mutation(
        "server/protect.py",
        "        if why is None:\n            return replies",
        "        if True:\n            return replies",
        "test_server_protect.py",
        "nobody_ever_answers",
    ),
    "more clients take part than a delta was weighed for": Mutation(
        "server/participants.py",
        "        if self.declared and len(nodes) > self.clients + last:",
        "        if False:",
        "test_server_protect.py",
        "more_clients",
    ),
    "who was drawn is told to everybody": Mutation(
        "server/run/run_folder.py",
        "    if not federation.keeps_counts:\n        return counts",
        "    if True:\n        return counts",
        "test_preconditions.py",
        "whoever and central",
    ),
    "everybody may read the operator's file": Mutation(
        "privacy/ledger/durable_files.py",
        "os.fchmod(descriptor, 0o600)  # whoever made it",
        "os.fchmod(descriptor, 0o644)",
        "test_preconditions.py",
        "operator_alone and central",
    ),
    "the mean is divided by a hidden number of clients": Mutation(
        "server/participants.py",
        "self.population or self.clients",
        "self.clients",
        "test_preconditions.py",
        "declared and all",
    ),
    "records are planned as if nothing were spent": Mutation(
        "strategies/record_plan.py",
        "record.budget(), prior, whole)",
        "record.budget(), (), whole)",
        "test_preconditions.py",
        "a_second_run",
    ),
    "a run goes on though every client has refused": Mutation(
        "server/rounds.py",
        "if ending is None and grid.all_spent:",
        "if False:",
        "test_preconditions.py",
        "ends_with_the_round",
    ),
    "changed data begin a new budget": Mutation(
        "privacy/ledger/data_sets.py",
        "changed = bool(known.fingerprints) and known.fingerprints != prints",
        "changed = False",
        "test_preconditions.py",
        "lost_less",
    ),
    "what is frozen travels": Mutation(
        "tasks/arrays.py",
        "if item[0] not in frozen",
        "",
        "test_client_tasks_mails.py",
        "only_adapters",
    ),
    "a canary record that is out trains": Mutation(
        "client/dp_sgd/record_canaries.py",
        "np.where(coins[:count], 1, -1)",
        "np.ones(count, int)",
        "test_client_record_canaries.py",
        "show_what_is_claimed and book",
    ),
    "an instruction is handled before it is written down": Mutation(
        "links/device_answers.py",
        "begun.note(name)",
        "pass",
        "test_client_link.py",
        "written_down_before",
    ),
    "a reply that comes twice counts twice": Mutation(
        "links/grpc/server_end.py",
        ".pop(gathering.id, None)",
        ".get(gathering.id)",
        "test_server_link_grid.py",
        "a_second_one_is_counted",
    ),
    "noise removed": Mutation(
        "privacy/mechanisms/private_sum.py",
        "block += sample(sigma, block.size, stream)",
        "pass",
        SUM_TESTS,
        "claimed_scale",
    ),
    "noise scaled by a wrong clip": Mutation(
        "server/accounts.py",
        "self.plan.noise_over_clip * self.more_noise",
        "self.plan.noise_over_clip * self.plan.clipping_norm",
        GRID_TESTS,
        "planned_scale",
    ),
    "noise scaled by the next round's clip": Mutation(
        "server/accounts.py",
        "self._noise.add(total, row, self.noise, spec)",
        "self._noise.add(total, row, self.noise, replace(spec, cells=int(0.9 * spec.cells)))",
        "test_server_adaptation.py",
        "of_the_round_and_not_of_the_next",
    ),
    "adaptive clipping in the wrong direction": Mutation(
        "privacy/mechanisms/adaptive_clipping.py",
        "math.exp(-self.learning_rate",
        "math.exp(self.learning_rate",
        "test_privacy_adaptive_clipping.py",
        "goes_to_the_quantile",
    ),
    "adaptive noise gated by PLD": Mutation(
        "privacy/ledger/ledger.py",
        "if order is None else admits",
        "if True else admits",
        "test_privacy_filter.py",
        "gate_of_an_adaptive_release",
    ),
    "all steps of Opacus are charged as one": Mutation(
        "privacy/opacus.py",
        "self.ledger.reserve_new(release)",
        "self._steps == 0 and self.ledger.reserve_new(release)",
        "test_privacy_opacus.py",
        "stops_inside or noise_of_nothing",
    ),
    "noised gradients that nobody has paid for stay": Mutation(
        "privacy/opacus.py",
        "optimizer.zero_grad(set_to_none=True)",
        "pass",
        "test_privacy_opacus.py",
        "stops_inside",
    ),
    "a strategy object keeps what a run left in it": Mutation(
        "server/run/build.py",
        "return deepcopy(given)",
        "return given",
        "test_face.py",
        "begins_every_run_afresh",
    ),
    "Opacus' noise may come from a seed": Mutation(
        "privacy/opacus.py",
        "if seed < BY_HAND:",
        "if seed < 0:",
        "test_privacy_opacus.py",
        "from_a_seed",
    ),
    "clip skipped at the client": Mutation(
        "privacy/mechanisms/private_sum.py",
        "return min(1.0, spec.aim(coordinates) / norm) if norm > 0 else 1.0",
        "return 1.0",
        SUM_TESTS,
        "keeps_its_direction",
    ),
    "clip skipped at the server": Mutation(
        "privacy/mechanisms/private_sum.py",
        "if spec.clipping_norm is not None and squared > float(spec.cells) ** 2:",
        "if False:",
        SUM_TESTS,
        "clips_again",
    ),
    "a coarse grid forgets what its rounding takes": Mutation(
        "privacy/mechanisms/private_sum.py",
        "math.sqrt(wanted**2 + SMOOTHING**2)",
        "wanted",
        SUM_TESTS,
        "rounding_takes",
    ),
    "clip before the mask": Mutation(
        "privacy/mechanisms/sum_spec.py",
        "(None if norm is None else norm * factor for norm",
        "(None if norm is None else norm for norm",
        COMPRESSION_TESTS,
        "norm_of_what_is_kept or signal_over_noise",
    ),
    "a record is clipped before the mask": Mutation(
        "client/dp_sgd/sketched.py",
        "                left = self.sketch.of(whole)",
        "                left = whole",
        "test_server_compression.py",
        "before_it_is_clipped and hooks",
    ),
    "a compressed record is clipped as a whole one": Mutation(
        "client/dp_sgd/together.py",
        "max_grad_norm=terms.max_grad_norm * factor, sketch=sketch",
        "sketch=sketch",
        "test_server_compression.py",
        "what_is_kept_of_its_norm",
    ),
    "gain forgotten": Mutation(
        "privacy/mechanisms/compression.py",
        "    whole *= sketch.compression.gain\n",
        "",
        COMPRESSION_TESTS,
        "what_comes_back",
    ),
    "one mask for two rounds' sums": Mutation(
        "privacy/mechanisms/compression.py",
        'row.to_bytes(8, "big") + run.encode()',
        "run.encode()",
        COMPRESSION_TESTS,
        "its_own_matrix",
    ),
    "sampling fixed while accounted as Poisson": Mutation(
        "strategies/cohorts.py",
        "chosen = stream.uint64(len(population)) < np.uint64(int(self.rate * 2**64))",
        "chosen = np.argsort(np.argsort(stream.uint64(len(population)))) < self.rate * len(population)",
        "test_strategies_cohorts.py",
        "binomial",
    ),
    "ledger written after the release": Mutation(
        "server/accounts.py",
        "self.privacy.ledger.reserve_new(self._release(row, cohort))",
        "pass",
        GRID_TESTS,
        "durable_before",
    ),
    "same noise in two rounds": Mutation(
        "server/noise_rows.py",
        'self.randomness.stream("noise", row)',
        'self.randomness.stream("noise")',
        GRID_TESTS,
        "no_noise_repeats",
    ),
    "separation not enforced": Mutation(
        "strategies/cohorts.py",
        "if client not in recent and",
        "if",
        "test_strategies_cohorts.py",
        "separation_and_participations",
    ),
    "sensitivity forgets how often a client takes part": Mutation(
        "privacy/mechanisms/correlated_noise.py",
        "self.separation)[: self.max_participations]",
        "self.separation)[:1]",
        "test_privacy_correlated_noise.py",
        "moves_the_protected_rows",
    ),
    "a cycle's rounds are paid once a run": Mutation(
        "privacy/plan.py",
        "(row - 1) % (self.mechanism.rounds or 1)",
        "(row > 1 and self.mechanism.rounds)",
        "test_strategies_cyclic_poisson.py",
        "event_is_that_of",
    ),
    "the coin of a turn is accounted at the rate of all rounds": Mutation(
        "strategies/cohorts.py",
        "return self._coins.event(mechanism) if self.secret",
        "return PoissonSampledDpEvent(self.rate, mechanism) if self.secret",
        "test_strategies_cyclic_poisson.py",
        "no_likelihood",
    ),
    "bands reach from one turn into the next": Mutation(
        "privacy/mechanisms/correlated_noise.py",
        "if self.bands > self._most_bands:",
        "if False:",
        "test_strategies_cyclic_poisson.py",
        "break_the_claim",
    ),
    "the ledger tells who was drawn in secret": Mutation(
        "server/noise_rows.py",
        "() if self.secret else tuple(cohort)",
        "tuple(cohort)",
        "test_strategies_cyclic_poisson.py",
        "tells_nobody",
    ),
    "fresh noise after a resume": Mutation(
        "server/noise_rows.py",
        "partial(keyed_stream, self.key,",
        "partial(keyed_stream, __import__('os').urandom(32),",
        "test_server_noise_rows.py",
        "takes_back_the_noise",
    ),
    "a row of noise used twice": Mutation(
        "server/noise_rows.py",
        "paid if self.randomness.seed is None else paid[:number]",
        "paid[:number]",
        "test_server_noise_rows.py",
        "not_used_again",
    ),
    "Poisson batches drawn with a fixed size": Mutation(
        "strategies/record_plan.py",
        "np.flatnonzero(stream.uint64(records) < np.uint64(int(self.sample_rate * 2**64)))",
        "np.argsort(stream.uint64(records))[: int(self.sample_rate * records)]",
        "test_client_training.py",
        "poisson_draws",
    ),
    "clip skipped in book-keeping": Mutation(
        "client/dp_sgd/book_keeping.py",
        "factors = (optimizer.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)",
        "factors = torch.ones_like(norms)",
        "test_client_book_keeping.py",
        "those_of_opacus and embedding",
    ),
    "ledger not fsynced": Mutation(
        "privacy/ledger/hash_chain.py",
        "'FULL' if durable",
        "'NORMAL' if durable",
        "test_privacy_ledger.py",
        "synced_in_full",
    ),
    "metrics leave beside the sum": Mutation(
        "strategies/wire.py",
        "Message(RecordDict({VECTOR_RECORD: memory_arrays({VECTOR: sent})}), reply_to=message)",
        "Message(RecordDict({VECTOR_RECORD: memory_arrays({VECTOR: sent}), 'c': ConfigRecord({'x': 1})}), "
        "reply_to=message)",
        GRID_TESTS,
        "weighs_the_same",
    ),
    "mask skipped": Mutation(
        "privacy/secagg/attempt.py",
        "add_masks(words, masks, suite)",
        "pass",
        "test_server_secure_sum.py",
        "in_the_clear",
    ),
    "noise forgets what its table drew": Mutation(
        "privacy/mechanisms/discrete_gaussian.py",
        "_digits.subtract(box, own) for",
        "box for",
        "test_privacy_discrete_gaussian.py",
        "to_the_last_digit",
    ),
    "a client's share of the noise dropped": Mutation(
        "privacy/mechanisms/distributed.py",
        "if spec.sigma:\n        _add_noise(words, spec.sigma, stream)",
        "if False:\n        pass",
        "test_privacy_distributed_shares.py",
        "silent_client",
    ),
    "layers of noise that nobody adds": Mutation(
        "privacy/mechanisms/distributed.py",
        "for layer, own in zip(spec.layers, layers, strict=True):\n        _add_noise(words, layer.sigma",
        "for layer, own in zip(spec.layers, layers, strict=True):\n        _add_noise(words[:0], layer.sigma",
        "test_privacy_distributed_shares.py",
        "what_stays_closed",
    ),
    "noise opened to fewer survivors than it is for": Mutation(
        "privacy/secagg/client.py",
        "if len(alive) >= least)",
        "if least)",
        "test_privacy_secagg_protocol.py",
        "as_many_survivors_as_they_say",
    ),
    "noise opened before a quorum has signed": Mutation(
        "privacy/secagg/attempt.py",
        "if said.survivors != view:",
        "if False:",
        "test_privacy_secagg_protocol.py",
        "no_quorum_signed",
    ),
    "survivors that nobody has checked": Mutation(
        "privacy/secagg/attempt.py",
        "if len(signed.intersection(agreed.neighbours(other))) < enough",
        "if False",
        "test_privacy_secagg_attacks.py",
        "the_server_made_up",
    ),
    "a hybrid key of X25519 alone": Mutation(
        "privacy/secagg/hybrid.py",
        "return derive(key + secret,",
        "return derive(key + bytes(32),",
        "test_privacy_secagg_hybrid.py",
        "both_secrets_are_needed or has_no_mask",
    ),
    "survivors not counted before a sum is opened": Mutation(
        "privacy/secagg/server.py",
        "if count < self._terms.minimum_survivors:",
        "if False:",
        "test_server_secure_sum.py",
        "too_few_release_nothing",
    ),
    "an opened sum that nobody weighs": Mutation(
        "server/masked_sums.py",
        "if norm > most:",
        "if False:",
        "test_server_secure_sum.py",
        "random_words or cannot_be_true",
    ),
    "what a member says of its noise counts without limit": Mutation(
        "privacy/mechanisms/sum_bound.py",
        "float(min(sigma, max(most, 0)) ** 2)",
        "float(sigma**2)",
        "test_privacy_sum_bound.py",
        "lie_is_counted_once",
    ),
    "a search that never halves": Mutation(
        "server/culprit_search.py",
        "return frozenset.intersection(*sums)",
        "return sums[-1]",
        "test_server_culprit_search.py",
        "alone_after_log_n",
    ),
    "a part whose sum nobody weighs": Mutation(
        "server/masked_sums.py",
        "            if found.why:\n",
        "            if found.why and len(parts) == 1:\n",
        "test_server_culprit_search.py",
        "others_go_on",
    ),
    "a deal whose degree nobody checks": Mutation(
        "privacy/secagg/server.py",
        "self.blamed.update(dict.fromkeys(self._dealings.unproved(), Fault.BAD_DEAL))",
        "pass",
        "test_privacy_secagg_cheats.py",
        "costs_nobody_else and degree",
    ),
    "a share that its holder does not check": Mutation(
        "privacy/secagg/parcel.py",
        "check_share(claim, point, pair,",
        "(lambda *_: None)(claim, point, pair,",
        "test_privacy_secagg_cheats.py",
        "costs_nobody_else and wrong",
    ),
    "a complaint that is believed without a check": Mutation(
        "privacy/secagg/dealings.py",
        "if not on_curve(keys[1]):",
        "if proof:",
        "test_privacy_secagg_cheats.py",
        "costs_nobody_else and complaint",
    ),
    "a secret disclosed for a deal that nobody signed": Mutation(
        "privacy/secagg/client.py",
        "verify(self.roster.member(peer, now).public, cohort, deal_body(peer, signed), signed.signature)",
        "pass",
        "test_privacy_secagg_cheats.py",
        "disclosed_for",
    ),
    "a revealed share that nobody checks": Mutation(
        "privacy/secagg/server.py",
        "if self._dealings.wrong(node, held, self._living):",
        "if False:",
        "test_privacy_secagg_cheats.py",
        "reveal_wrong_shares",
    ),
    "a charge before the check of shares": Mutation(
        "privacy/secagg/client.py",
        "if attempt.stage is not due:",
        "if attempt.stage > due:",
        "test_privacy_secagg_cheats.py",
        "before_shares_are_checked",
    ),
    "opened twice for one reservation": Mutation(
        "server/secure_sum.py",
        "if ended.total is not None or attempt.asked_to_open or attempt.in_vain:",
        "if ended.total is not None or attempt.in_vain:",
        "test_server_secure_sum.py",
        "no_second_attempt",
    ),
    "a node that opens one round again": Mutation(
        "privacy/secagg/client.py",
        "[attempt.terms.round] = OVER",
        "[attempt.terms.round] = attempt.terms.attempt",
        "test_privacy_secagg_attacks.py",
        "is_over_for_it",
    ),
    "a vector's spec taken from the server": Mutation(
        "client/secure_update.py",
        "if not met:",
        "if False:",
        "test_client_secure_mod.py",
        "did_not_agree_on",
    ),
    "metrics uncharged": Mutation(
        "privacy/mechanisms/private_sum.py",
        "if squared > float(spec.cells) ** 2:\n        shrink(out, spec)",
        "out[flat.size :] *= 8",
        SUM_TESTS,
        "never_exceeds",
    ),
    "what was added in place stays though it is too long": Mutation(
        "privacy/mechanisms/private_sum.py",
        "if squared > float(spec.cells) ** 2:\n        _add",
        "if False:\n        _add",
        SUM_TESTS,
        "added_at_once",
    ),
    "composition dropped": Mutation(
        "privacy/ledger/book.py",
        "return event if count == 1 else SelfComposedDpEvent(event, count)",
        "return event if count else SelfComposedDpEvent(event, count)",
        "test_privacy_ledger.py",
        "spent_to_the_last_round",
    ),
    "composition of plain noise dropped": Mutation(
        "privacy/accounting/gaussian.py",
        "(precision or 0.0) * n for",
        "(precision or 0.0) for",
        "test_privacy_ledger.py",
        "spent_to_the_last_round",
    ),
    "wrong adjacency": Mutation(
        "privacy/accounting/renyi.py",
        "case Adjacency.REPLACE_ONE:\n            return Relation.REPLACE_ONE",
        "case Adjacency.REPLACE_ONE:\n            return Relation.REPLACE_SPECIAL",
        "test_privacy_accounting.py",
        "replace_one",
    ),
    "RNG reused across clients": Mutation(
        "client/app.py",
        'randomness.stream("dp-sgd noise", number, client)',
        'randomness.stream("dp-sgd noise", number)',
        "test_client_training.py",
        "no_two_clients_or_rounds_draw",
    ),
    "a quorum's draw counts as secret": Mutation(
        "server/run/build.py",
        "return seen(cohort, SEEN_ANSWERS) if link.goes_by_answers else cohort",
        "return cohort",
        ANSWERS_TESTS,
        "give_away",
    ),
    "the planned are accounted and not the invited": Mutation(
        "strategies/cohorts.py",
        "return self.invited.event(mechanism)",
        "return self.planned.event(mechanism)",
        ANSWERS_TESTS,
        "invited_are_accounted",
    ),
    "a sum below the quorum is released": Mutation(
        "server/open_sum.py",
        "if replies < participants.answers.quorum:",
        "if False:",
        ANSWERS_TESTS,
        "below_the_quorum",
    ),
    "a device releases without a reservation": Mutation(
        "client/device/own_ledger.py",
        "ledger.reserve_new(release)",
        "pass",
        "test_client_device.py",
        "charged_by_the_claim",
    ),
    "ledger reset on reinstall": Mutation(
        "server/run/federation.py",
        'if self.simulated:\n            return folder / "ledger"',
        'if True:\n            return folder / "ledger"',
        "test_end_to_end_run.py",
        "what_is_left_and_a_third",
    ),
    "a second client with the same records is free": Mutation(
        "client/app.py",
        'f"{MECHANISM} {client}"',
        "MECHANISM",
        "test_end_to_end_owner.py",
        "both_charged",
    ),
    "a cap is not asked for": Mutation(
        "privacy/ledger/ledger.py",
        "return capped(self.path, self._budget)",
        "return self._budget",
        "test_privacy_caps.py",
        "lowers or ended",
    ),
    "a client's ledger can be shed": Mutation(
        "server/run/prepare.py",
        "require_heads(Path(client.record.ledger_dir), checkpoint.client_heads)",
        "pass",
        "test_end_to_end_owner.py",
        "cannot_be_shed",
    ),
    "equal audit scores ordered by membership": Mutation(
        "privacy/audit/one_run.py",
        "np.lexsort((inside, -scores))",
        "np.lexsort((~inside, -scores))",
        AUDIT_TESTS,
        "equal_scores",
    ),
    "an audit's t test that never rejects": Mutation(
        "privacy/audit/normality.py",
        "float(nct.sf(self.mu * self._scale, self._degrees",
        "max(1.0, nct.sf(self.mu * self._scale, self._degrees",
        AUDIT_TESTS,
        "halved_noise",
    ),
    "an audit's p-value halved": Mutation(
        "privacy/audit/normality.py",
        "float(nct.sf(self.mu * self._scale, self._degrees",
        "float(0.5 * nct.sf(self.mu * self._scale, self._degrees",
        AUDIT_TESTS,
        "correct_runs_are_not",
    ),
    "an audit's threshold picked once the coins are known": Mutation(
        "privacy/audit/normality.py",
        "middle = np.median(np.concatenate([members, others]))",
        "middle = max(members, key=lambda at: (members > at).sum() + (others < at).sum())",
        AUDIT_TESTS,
        "correct_runs_are_not",
    ),
    "canary records all scored alike": Mutation(
        "privacy/audit/step_ratio.py",
        "        there = (sums - 0.5) / noise**2",
        "        return np.zeros_like(sums)",
        "test_client_record_canaries.py",
        "log_likelihood_ratio",
    ),
    "canary records scored as if every batch held them": Mutation(
        "privacy/audit/step_ratio.py",
        "return there if rate == 1 else",
        "return there if rate else",
        "test_client_record_canaries.py",
        "log_likelihood_ratio",
    ),
    "an audit that leaves the books to the ledger": Mutation(
        "server/auditing.py",
        "return float(booked >= BOOKED *",
        "return float(booked >= 0 *",
        "test_simulations_audit_alarms.py",
        "counts_less",
    ),
    "an audit's commitment gives its coins away": Mutation(
        "privacy/audit/canary_clients.py",
        "hashlib.sha256(seed + np.packbits",
        "hashlib.sha256(np.packbits",
        "test_privacy_audit_canaries.py",
        "commitment_binds",
    ),
    "an audit's chi-square on wrong degrees": Mutation(
        "privacy/audit/free_checks.py",
        "float(chdtr(size, energy)) for",
        "float(chdtr(size + 5, energy)) for",
        "test_privacy_audit_canaries.py",
        "correct_noise_keeps_the_level",
    ),
    "an audit that counts the direction it looks away from": Mutation(
        "privacy/audit/free_checks.py",
        "old), released.size - 1",
        "old), released.size",
        "test_privacy_audit_canaries.py",
        "rounds_together",
    ),
    "Fisher's method without its pooling": Mutation(
        "privacy/audit/memorisation.py",
        "return float(chdtrc(2 * len(p_values), -2 * sum(map(math.log, p_values))))",
        "return min(p_values)",
        "test_privacy_audit_memorisation.py",
        "fisher",
    ),
    "a callback sees a private value": Mutation(
        "server/run/run_folder.py",
        "shown_model(state.arrays), shown(audit))",
        "shown_model(state.arrays), progress)",
        "test_server_callbacks.py",
        "reachable and central",
    ),
    "a promise of no use is not refused on real data": Mutation(
        "server/run/unit_plan.py",
        "if federation.simulated:\n        warn(str(refusal))",
        "if True:\n        warn(str(refusal))",
        "test_server_before_spending.py",
        "of_no_use and few",
    ),
    "one of several runs takes the whole budget": Mutation(
        "privacy/plan.py",
        "num_rounds=runs * (num_rounds or self.num_rounds)",
        "num_rounds=num_rounds or self.num_rounds",
        "test_server_before_spending.py",
        "one_of_several_too",
    ),
    "a server goes on after an alarm": Mutation(
        "deployment/serve.py",
        "Status.EXHAUSTED, Status.ALARMED)",
        "Status.EXHAUSTED)",
        "test_deployment_serve.py",
        "stops_a_server_for_good",
    ),
    "audit forgets delta": Mutation(
        "privacy/audit/one_run.py",
        "beta + 2 * guesses.canaries * delta * excess",
        "beta",
        AUDIT_TESTS,
        "plain_sum_of_the_theorem",
    ),
    "the whole budget of false alarms spent at every look": Mutation(
        "privacy/audit/alarms.py",
        "self.alpha / (families * self.planned[_CONFIRMING.get(test, test)])",
        "self.alpha",
        "test_privacy_audit_memorisation.py",
        "together_spend_alpha",
    ),
    "what confirms a free check stops no run": Mutation(
        "privacy/audit/alarms.py",
        "certain or test in state.alarmed",
        "certain",
        "test_privacy_audit_memorisation.py",
        "next_looks_confirms",
    ),
    "coins of a large population come up at another rate": Mutation(
        "strategies/draws.py",
        "for _ in range(BLOCK.bit_length() - 1):",
        "for _ in range(BLOCK.bit_length() - 2):",
        "test_strategies_draws.py",
        "coins_of_many",
    ),
    "audit of known rounds under amplification": Mutation(
        "privacy/audit/canary_clients.py",
        'if any(hasattr(leaf, "sampling_probability")',
        'if any(hasattr(leaf, "sampling_rate")',
        "test_privacy_audit_canaries.py",
        "refused_under_amplification",
    ),
    "audit misses reused noise where updates move": Mutation(
        "privacy/audit/free_checks.py",
        "return max(0.0, energy - float(np.vdot(released, before)) ** 2 / old), released.size - 1",
        "return energy, released.size - 1",
        "test_privacy_audit_canaries.py",
        "noise_that_was_there_before",
    ),
}


# Their tests run whole commands: `pytest -m campaign tests/test_mutations.py`.
SLOW = {
    "Opacus' noise may come from a seed",
    "RNG reused across clients",
    "a body in pieces has no bound",
    "a callback sees a private value",
    "a client's ledger can be shed",
    "a collate function that mixes examples passes",
    "a ledger of protect lies where the process works",
    "a promise of no use is not refused on real data",
    "a run goes on though every client has refused",
    "a second client with the same records is free",
    "a server goes on after an alarm",
    "a strategy object keeps what a run left in it",
    "all steps of Opacus are charged as one",
    "an audit that leaves the books to the ledger",
    "clip skipped in book-keeping",
    "everybody may read the operator's file",
    "ledger reset on reinstall",
    "protect accepts any delta",
    "records are planned as if nothing were spent",
    "records are trained without measuring that they are apart",
    "sensitivity forgets how often a client takes part",
    "the mean is divided by a hidden number of clients",
    "the same real records pay from two budgets",
    "who was drawn is told to everybody",
}


@dataclass(frozen=True)
class Tried:
    """A copy of the package, and the process whose forks run its tests."""

    copy: Path
    forks: Popen[str]

    def run(self, files: Iterable[str], select: str) -> tuple[int, str]:
        """Return pytest's exit code and what it printed."""
        output = self.copy.parent / "output"
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "--assert=plain", "-k", select]
        asked = [str(self.copy), str(output), [*arguments, *(f"tests/{file}" for file in files)]]
        assert self.forks.stdin is not None and self.forks.stdout is not None
        print(json.dumps(asked), file=self.forks.stdin, flush=True)
        return int(self.forks.stdout.readline()), output.read_text()


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Generator[Tried]:
    """A copy of the package that shadows the installed one."""
    copy = tmp_path_factory.mktemp("mutations") / "fedveil"
    for room in (*ROOMS, "tests"):
        shutil.copytree(ROOT / room, copy / room)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "py.typed"):
        shutil.copy2(path, copy / path.name)
    # Other people's plug-ins would be rewritten in every fork, which takes longer than most of the tests.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-B", ROOT / "tests" / "faults" / "pytest_forks.py"]
    with Popen(command, stdin=PIPE, stdout=PIPE, env=environment, text=True) as forks:
        yield Tried(copy, forks)


def test_an_audit_sees_each_or_the_evidence_says_why_not() -> None:
    tried = runpy.run_path(str(ROOT / "tests" / "oracles" / "audit_mutations.py"))
    assert sorted([*tried["RUNS"], *tried["BEYOND"]]) == sorted(MUTATIONS)
    evidence = (ROOT / "docs" / "evidence" / "audits.md").read_text()
    for name in MUTATIONS:
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.+) \|$", evidence, re.MULTILINE)
        why = (tried["BEYOND"] | tried["UNSEEN"]).get(name)
        assert why in row if why else re.fullmatch(r"5 \| .*red .*", row), name


def test_each_quote_is_in_its_file_once() -> None:
    fits = {name: (ROOT / each.file).read_text().count(each.before) for name, each in MUTATIONS.items()}
    assert {name: count for name, count in fits.items() if count != 1} == {}
    assert set(MUTATIONS) >= SLOW


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.campaign if each in SLOW else ()) for each in MUTATIONS]
)
def test_the_suite_goes_red(name: str, tried: Tried) -> None:
    mutation = MUTATIONS[name]
    file = tried.copy / mutation.file
    file.write_text(file.read_text().replace(mutation.before, mutation.after))
    code, output = tried.run([mutation.tests], mutation.select)
    shutil.copy2(ROOT / mutation.file, file)
    assert code == 1, output[-2000:]
    assert " failed" in output


@pytest.mark.campaign
def test_in_the_copy_without_a_fault_the_same_tests_are_green(tried: Tried) -> None:
    files = sorted({mutation.tests for mutation in MUTATIONS.values()})
    each = sorted({f"({mutation.tests} and ({mutation.select}))" for mutation in MUTATIONS.values()})
    code, output = tried.run(files, " or ".join(each))
    assert code == 0, output[-2000:]


def test_in_the_copy_without_a_fault_tests_are_green(tried: Tried) -> None:
    """Those that the campaign above runs are in the suite as they stand; here is shown that the copy is not the fault."""
    code, output = tried.run(["test_strategies_cohorts.py", "test_server_noise_rows.py"], "")
    assert code == 0, output[-2000:]
