"""Audits of a whole run under every mutation of tests/test_mutations.py, or why no audit can see it.

`python tests/oracles/audit_mutations.py [NAME ...]` prints the rows of the table in docs/evidence/audits.md;
about ten minutes. A run that does not end within ten is a row too.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_SECONDS, TIMED_OUT = 600, 124
MADE: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "test_mutations.py"))
ALL = ("cohort=all", "num_rounds=20")
SEPARATED = ("cohort=min_separation", "cohort.size=40")
MASKED = ("task=digits", "task.num_clients=40", "cohort=all", "num_rounds=8", "privacy=client_distributed",
          "privacy.noise_multiplier=2", "privacy.target_epsilon=null", "privacy.target_delta=0.005")  # fmt: skip
RECORD = ("task=digits", "task.num_clients=20", "privacy=record", "num_rounds=10", "audit.looks=2")
STEP = ("task=digits", "task.num_clients=20", "privacy=record_distributed", "privacy.target_epsilon=8",
        "privacy.sample_rate=0.3", "num_rounds=100", "audit.looks=2")  # fmt: skip
RUNS: dict[str, tuple[str, ...]] = {
    "noise removed": (),
    "the same cohort in every round": (),
    "noise forgets what its table drew": (),
    "noise scaled by a wrong clip": (),
    "noise scaled by the next round's clip": (),
    "same noise in two rounds": (),
    "sampling fixed while accounted as Poisson": (),
    "the planned are accounted and not the invited": ("cohort.over_selection=1.3",),
    "ledger written after the release": (),
    "composition dropped": (),
    "composition of plain noise dropped": ALL,
    "wrong adjacency": (*ALL, "privacy.adjacency=replace-one"),
    "clip skipped at the client": (),
    "clip skipped at the server": (),
    "separation not enforced": SEPARATED,
    "sensitivity forgets how often a client takes part": SEPARATED,
    "adaptive clipping in the wrong direction": ("privacy.clipping=adaptive", "audit.canaries=0"),
    "adaptive noise gated by PLD": ("privacy.noise_schedule=adaptive",),
    "metrics uncharged": (),
    "what was added in place stays though it is too long": (),
    "mask skipped": MASKED,
    "a client's share of the noise dropped": MASKED,
    "layers of noise that nobody adds": MASKED,
    "clip skipped in book-keeping": RECORD,
    "clip skipped one by one": (*RECORD, "privacy.gradients=one_by_one"),
    "Poisson batches drawn with a fixed size": RECORD,
    "RNG reused across clients": RECORD,
    "an optimizer reads gradients before their noise": (*RECORD, "cohort=all"),
    "a canary record that is out trains": RECORD,
    "records drawn once for all rounds": STEP,
    "records drawn more often than is accounted": STEP,
    "a compressed record is clipped as a whole one": (*STEP, "compress=mask"),
}
UNSEEN: dict[str, str] = {
    "noise forgets what its table drew": "wrong in digits of which no sum tells",
    "noise scaled by a wrong clip": "nothing is released: what was added is not what was reserved",
    "ledger written after the release": "nothing is released: what was not reserved cannot be committed",
    "composition of plain noise dropped": "the noise was planned, and is counted, by another account",
    "wrong adjacency": "the gate counts another way, and ends the run in time",
    "clip skipped at the client": "the server clips; skipped at both ends it is found",
    "clip skipped at the server": "the client clips; skipped at both ends it is found",
    "separation not enforced": "whoever took part least goes first, which keeps them apart all the same",
    "adaptive clipping in the wrong direction": "the norm follows noised counts, whichever way: the claim holds",
    "adaptive noise gated by PLD": "more rounds pass than a filter allows, each noised and counted as claimed",
    "metrics uncharged": "scalars beside the update grow, and canaries look at the update alone",
    "what was added in place stays though it is too long": "by steps of the grid, far below the noise",
    "mask skipped": "the sum is the same; the server sees more, where an audit of sums does not look",
    "layers of noise that nobody adds": "what survivors take back is noise as well: the sum is not shorter",
    "Poisson batches drawn with a fixed size": "no size of a batch leaves a client, and canaries tell no such difference",
    "RNG reused across clients": "each client's noise is as claimed; only two side by side would tell",
    "records drawn once for all rounds": "each round shows what one draw may; canaries are weighed round by round",
    "a canary record that is out trains": "a fault of the audit, which goes blind: it measures next to nothing",
}
ADMISSION = "who may take part or ask, and no number that is released"
BOOKS = "what is written down of a release, and not the release"
CONFIGURED = "a mistake that is taken for a setting, and a run that keeps to the setting"
PRECONDITION = (
    "a precondition: what leaks then is the task's doing, and the audit's own task has no such layer"
)
CARRIED = "an update made with another client's help is one update, clipped and noised as claimed"
LINK = "over a link alone, where no canary is there to count twice"
LIAR = "of a client that does not clip, over a link; those of an audit do"
MEMBER = "shows where a member lies, which an honest run's sums do not"
SERVER = "shows where a server lies, which an honest run's sums do not"
OPACUS = "in somebody's own loop of Opacus, which no audit watches"
WATCHED = "what those who watch are handed, and no number that is released"
PLANNED = "what a plan leaves for later or advises against; what is spent is counted as it is"
MEMORY = "of what a strategy remembers, which is released in any case"
ITSELF = "a fault of the audit, which the suite holds to its level and its power, and not of a run"
GRID = "by parts of a grid unit, which is far below the noise"
CHECKED = "of the check before a release; the noise itself is sized without it"
SHORTER = "its own ledger charges the noise that it takes, and it sits out sooner"
GATED = "each round is noised and counted as claimed, and all of them have one noise"
EVALUATED = "what clients measure of a model is in no training round, and canaries evaluate nothing"
PERSONS = "a canary is one record, and whoever has several is no canary"
REPORTED = "a figure of the report, and no number that is released"
BOUND = "what a run left, and who may change it afterwards: what was released is as it was"
DROWNED = "no canary has a gradient that the round's matrix takes to nothing"
ASKED = "what a question counts is in no training round, and canaries answer none"
TRAIL = "who decided what, and no number that is released"
SUPPLIED = "what a device installs, before any run"
STORY = "what members are told of, and no number that is released"
TOLD = "what a page says of a run, and not what the run has released"
ARMS = "each arm's sum has the noise that is claimed; whose clients are in it no sum tells"
WORSE = "the sum has the noise that is claimed, and the model is worse"
COUNTS = "who took part in a round, and no number that is released"
LARGE = "such a draw begins above 65 536 clients, more than an audit's runs have"
BEYOND: dict[str, str] = {
    **dict.fromkeys(
        (
            "a run that a kill left with its budget spent is refused",
            "a deadline interrupts an import",
            "a round that nobody answered is counted as it was planned",
        ),
        "of how a run ends or what its line says, and of nothing that is released",
    ),
    "a coarse grid forgets what its rounding takes": GRID,
    "rounding adds nothing to a record's part in a sum": GRID,
    "a short layer that is zero is an alarm": ITSELF,
    "the degree of a deal on a ring unproved": MEMBER,
    "compiled masks used unseen": "of masks of which nothing is left in a sum",
    **dict.fromkeys(
        ("a compiled key stream used unseen", "compiled noise used unseen"),
        "of a package that computes the same bits",
    ),
    "clip before the mask": WORSE,
    "a record is clipped before the mask": WORSE,
    "a record that is compressed to nothing is as long as it likes": DROWNED,
    "a packed vector that is too long stays in the sum": LIAR,
    "independence is measured on what a server sent": PRECONDITION,
    "data that remember what was read pass": PRECONDITION,
    "no step's own batch is looked at": PRECONDITION,
    "a model that mixed a step's examples trains on": PRECONDITION,
    "a report promises what mixed examples have refuted": PRECONDITION,
    "an odd example decides whether independence is measured": PRECONDITION,
    "gain forgotten": WORSE,
    "what rounding leaves out of a model is lost": WORSE,
    "a device trains on whatever a difference makes": WORSE,
    "a device trains on arrays beside a difference": WORSE,
    "a difference may unpack to any size": "memory of a device, and no number that is released",
    "a question told as a difference is another question": LINK,
    "a device that could not make its model is not asked again": "a device that sits a round out, and no number that is released",
    "a status takes each unit for the client": TOLD,
    "a second run does not look at what is spent": PLANNED,
    "a server does not count what sums of clients cost records": PLANNED,
    "a default target of whole clients is all that owners allow for records": PLANNED,
    "a run takes more than the least that an owner allows": PLANNED,
    "a client is in two arms": ARMS,
    "clients that have moved keep the arms of their places": ARMS,
    "clients that have moved keep the turns of their places": "of a run that goes on; each sum has the noise that is claimed",
    "epsilon of the arms is that of the first": ARMS,
    "a device takes a second deal of its run": ARMS,
    "a model's module is imported though nobody allowed it": "is no matter of the sum",
    "an arm's score is of all clients": ARMS,
    "an arm's score is charged as if all clients gave it": ARMS,
    "the scores of arms are in no plan": ARMS,
    "scores that noise leaves together are asked": ARMS,
    "one mask for two rounds' sums": WORSE,
    "a student learns of clients' data": "what is made of a model after the run, which an audit of the run does not see",
    "an export measures on private held-out data": "what is made of a model after the run, which an audit of the run does not see",
    "a report takes a string for markup": TOLD,
    "a promised epsilon is rounded down": TOLD,
    "a report of files that were changed does not say so": TOLD,
    "a run that failed is not closed": BOUND,
    "a refusal leaves no entry": TRAIL,
    "an alarm is overridden by nobody": TRAIL,
    "what a release is for is forgotten": TRAIL,
    "the ledger does not say what a vector holds": TRAIL,
    "the parts of a record's questions are each as long as its norm": ASKED,
    "a client adds half of the noise on its own answer": ASKED,
    "a device answers of its records uncharged": ASKED,
    "a device charges a person for one row of a question": ASKED,
    "what noise alone may have made is followed": ASKED,
    "a search begins that the budget does not afford": ASKED,
    "a search begins that the records' budget does not afford": ASKED,
    "what a client measures has no bound": EVALUATED,
    "clients train on what they hold out": EVALUATED,
    "clients evaluate uncharged": EVALUATED,
    "evaluations are in no plan": EVALUATED,
    "records are measured apart in training mode alone": EVALUATED,
    "metrics may go by what was measured before": EVALUATED,
    "a record that is not there moves another one out of training": EVALUATED,
    "records are held out by each other where they are hidden": EVALUATED,
    "spellings of a class at other sites are further classes": CONFIGURED,
    "a packed table is left out in silence": CONFIGURED,
    "equal rows of one label are held out where those of another train": EVALUATED,
    "a person is trained on and evaluated on": EVALUATED,
    "a run goes on under another rule of its held-out rows": EVALUATED,
    "an order of an earlier release is followed by another rule": EVALUATED,
    "a record's figures are each as long as its norm": EVALUATED,
    "how many records train is in a number that leaves": EVALUATED,
    "what several records lose is planned without evaluations": EVALUATED,
    "a device evaluates records under noise that nobody adds": EVALUATED,
    "an evaluation has the noise of its round": EVALUATED,
    "a client fails whose training diverges": SERVER,
    "a clipping norm of which no grid can be made": SERVER,
    "a failure on hidden records is given back": SERVER,
    "a record on which the task fails takes the others along": SERVER,
    "a simulated client fails in an encrypted sum whose task fails": SERVER,
    "a device fails in an encrypted sum whose task fails": SERVER,
    "squares too small for float32 are a norm of zero": SERVER,
    "a record changes how another one is rounded": SERVER,
    "a model that mixes rows is asked about rows that are hidden": ASKED,
    "ghost clipping takes Opacus' norms": SERVER,
    "a client fails whose records lack a metric": EVALUATED,
    "a held-out record on which the task fails takes the others along": EVALUATED,
    "a row on which a released model fails takes the others along": EVALUATED,
    "a record that is refused takes the others along": SERVER,
    "a client fails whose cell is no number": ASKED,
    "a row changes the words of the others": ASKED,
    "an evaluation coarser than its resolution is asked": EVALUATED,
    "a device evaluates on what it was told to train on": EVALUATED,
    "a protected app's evaluation is not in its plan": EVALUATED,
    "columns are read in another order where they arrive": ASKED,
    "a device tells of another model than the one it is asked about": ASKED,
    "a question about another task's model is charged": ASKED,
    "attributions are drawn on the scale of how many rows there are": ASKED,
    "an answer about one model is one about another": ASKED,
    "a segment is not clipped": ASKED,
    "a question is asked before it is charged": ASKED,
    "a run plans without its question about scaling": ASKED,
    "a client's rounds are planned without its question": ASKED,
    "a device plans its rounds without the question": ASKED,
    "a run that goes on asks again by what to scale": ASKED,
    "a question wider than its resolution is asked": ASKED,
    "a record answers another question": ASKED,
    "a record answers for other clients": ASKED,
    "questions spend anew under another name": ASKED,
    "a device answers for any purpose": ASKED,
    "questions spend what training may": ASKED,
    "a device clips a question by the server's bound": ASKED,
    "verify looks at no signature": BOUND,
    "a signature is not over those before it": BOUND,
    "verify looks at no hash of a bundle": BOUND,
    "verify takes a file more": BOUND,
    "a device's receipt has no salt": "who took part in how many rounds, and no number that is released",
    "receipts of a trusted server's clients are everybody's": "who is a member, and no number that is released",
    "a receipt of another run is taken": BOUND,
    "receipts that nobody gave are taken": BOUND,
    "a manifest names what lies outside its folder": BOUND,
    "a run that goes on claims of a trusted server what others have seen": TOLD,
    "verify takes a manifest that the ledger does not bind": BOUND,
    "verify believes the epsilon of a result": BOUND,
    "verify believes the epsilon of a round": BOUND,
    "verify believes the verdict of an audit": BOUND,
    "verify believes the stamps of a page": BOUND,
    "verify believes the page": BOUND,
    "the page of a run is served to other machines": TOLD,
    "a page is served to whoever rebinds a name": TOLD,
    "numbers are told to whoever rebinds a name": TOLD,
    "a page tells what its operator alone may read": COUNTS,
    "verify believes a report of answers": BOUND,
    "verify does not look for a known head": BOUND,
    "what was overdrawn before the budget grew is not found": BOUND,
    "a run goes on after its close and counts as closed": BOUND,
    "an adopted ledger does not say which mode charged it": "a second budget for the same people, of which each run spends its own as claimed",
    "no example of a person is left out": PERSONS,
    "a person is charged what one example costs": PERSONS,
    "a person's examples in the sum of all are charged as one": PERSONS,
    "every client trains on a person that two may": PERSONS,
    "a policy bounds no norm of a record in a masked sum": "the norm is a bound of the owner's own, and noise is a multiple of it",
    "a person's clients are chosen by a roster that the cohort did not sign": PERSONS,
    "a device holds out hidden records by a share that a server chooses": "how many records train is told beside the update, and is no part of it",
    "a device charges a person at two clients as at one": PERSONS,
    "a ledger of records goes on as one of persons": BOOKS,
    "the same real records pay from two budgets": "a second budget for the same people, of which each run spends its own as claimed",
    "what a layer writes reaches the next part of a step": PRECONDITION,
    "a client takes the noise of another size": SHORTER,
    "a client takes the noise of another's ledger": SHORTER,
    "the gate's look-ahead covers less noise": GATED,
    "the gate's look-ahead covers larger samples": GATED,
    "the trade-off of errors knows one side of a loss": REPORTED,
    "a curve is that of the client who lost least": REPORTED,
    "mu forgets that a unit is replaced": REPORTED,
    "a device's closed form forgets that a unit is replaced": BOOKS,
    "a fine grid has one side of a loss": REPORTED,
    "rounding of many rounds is not counted": REPORTED,
    "what a composition drops is lost": REPORTED,
    "an epsilon is that of the first side": REPORTED,
    "a nested sample forgets that its unit may be absent": REPORTED,
    "an adaptive ledger's budget is taken for that of another delta": REPORTED,
    "real data without a name are all one data set": "two runs pay from one ledger; no sum tells",
    "records of the first client alone are measured": "what a layer does to other data; no noise is missing",
    "clients of one process are not held apart": "one client's part in another's update is within its clip",
    "a task keeps one optimizer for all clients": "one client's part in another's update is within its clip",
    "a hidden client tells that it has no examples": "whether a client answers, and no number that is released",
    "a loss is measured on the classes of a few examples": "a loss of examples that nobody has yet; no noise is missing",
    "a loss is measured on common targets alone": "a loss that leaves out labels which no task of the audit has; no noise is missing",
    "two runs charge the same clients' records at once": "two budgets are spent; each sum has its noise",
    "data that nobody can tell apart count as unchanged": "two budgets are spent; each sum has its noise",
    "two modes charge the same records at once": "two budgets are spent; each sum has its noise",
    "a protected app measures private held-out data": "leaves beside the sum, where an audit of sums does not look",
    "private held-out data are evaluated": "leaves beside the sum, where an audit of sums does not look",
    "a device trains by another schema than the server's": "another model is trained, and noised as claimed",
    "real tables are measured on their clients' rows": "leaves beside the sum, where an audit of sums does not look",
    "a schema is inferred from real tables": "leaves beside the sum, where an audit of sums does not look",
    "an example's weight is divided by those of its batch": "each gradient is clipped as claimed; what an example moves in those of others is no canary's own",
    "devices do not agree on how numbers are scaled": "another model is trained, and noised as claimed",
    "devices do not agree on weights by group": "another model is trained, and noised as claimed",
    "an answer tells how many records were drawn": "leaves beside the sum, where an audit of sums does not look",
    "several local steps on a share of the noise": CONFIGURED,
    "an average holds other models than those released last": "which of the released models a mean holds, and no number more",
    "rounding left out of what a record moves": GRID,
    "a masked sum of records is rounded to the nearest": GRID,
    "rounding by coins is free": GRID,
    "a vector of records is pulled back after it is rounded": GRID,
    "noise in norms of a record, whatever rounding adds": GRID,
    "a client's records drawn once for all rounds": "as records drawn once for all rounds, in masked sums",
    "a colluder's share of the noise is counted": CHECKED,
    "noise of absent clients is counted": CHECKED,
    "a canary record is read beside the sum of another's": ITSELF,
    "an operator's call passes the front": ADMISSION,
    "the front takes whoever signs": ADMISSION,
    "a body in pieces has no bound": ADMISSION,
    "a bundle of another authority is used": ADMISSION,
    "a client takes an older roster": ADMISSION,
    "a running server takes an older roster": ADMISSION,
    "a list admits whom the roster has left out": ADMISSION,
    "a round goes by the roster that the run began with": ADMISSION,
    "a sum is prepared under a roster that is over": ADMISSION,
    "a door that is open to all of a machine": ADMISSION,
    "members that nobody vouches for are believed": "a device that is surrounded is sure of less noise; no run of an audit has strangers",
    "a cohort without the owner's peers is joined": ADMISSION,
    "a changed roster does not wait for its owner": ADMISSION,
    "a server takes a roster that forks": ADMISSION,
    "a run does not tell that its members changed": TRAIL,
    "a roster counts that too few members have signed": ADMISSION,
    "whoever signs a roster has vouched for it": ADMISSION,
    "a roster that waits is exchanged for another of its version": ADMISSION,
    "an attempt goes on under another roster than it began with": ADMISSION,
    "a device follows a log that forks": STORY,
    "two models of one round in a log pass for one story": STORY,
    "a final model is logged as the model of a round": STORY,
    "two final models of one run in a log pass for one story": STORY,
    "a model that the log does not hold is trained on": STORY,
    "anybody signs the head of a log": STORY,
    "a client's certificate signs the head of a log": STORY,
    "a server that stops telling its log is followed": STORY,
    "a proof of consistency shows the newer tree alone": STORY,
    "a question of another head is another question": STORY,
    "keys without a passphrase pass where one is asked for": ADMISSION,
    "shares leave before a quote was accepted": ADMISSION,
    "a quote that the owner's command refuses counts": ADMISSION,
    "a quote vouches for any nonce": ADMISSION,
    "one half of a double signature is enough": ADMISSION,
    "a roster counts without its second signature": ADMISSION,
    "one member's ended certificate stops every sum": "a server that ends, and no number that is released",
    "rounds are charged under a server's ended certificate": "a server that ends, and no number that is released",
    "a unit gives up on a full disk": "a server that ends, and no number that is released",
    "a device is admitted by Ed25519 alone under post-quantum signatures": ADMISSION,
    "a post-quantum suite rests on a roster that is signed once": ADMISSION,
    "a device takes a roster that forks": ADMISSION,
    "a device installs names that are bound to no bytes": SUPPLIED,
    "a lock may name what is bound to no bytes": SUPPLIED,
    "a token opens twice": ADMISSION,
    "an expired token opens": ADMISSION,
    "an expired token is approved": ADMISSION,
    "a token opens for another name": ADMISSION,
    "a federation file kept that nobody has read": ADMISSION,
    "a key that was replaced is admitted again": ADMISSION,
    "half a key's file keeps a member in": ADMISSION,
    "a member without a place in the file": ADMISSION,
    "a token asks for another name": ADMISSION,
    "a server may put its keys in the place of a device's": ADMISSION,
    "a device enrols with whoever answers": ADMISSION,
    "a device takes any certificate": ADMISSION,
    "a device takes an earlier certificate": ADMISSION,
    "a policy that others may change is taken": ADMISSION,
    "a server whose core dumps hold its keys": "what a crash leaves on a disk, and no number that is released",
    "an error that nobody thought of costs the round": "a server that ends, and no number that is released",
    "a suite that its owner does not accept": ADMISSION,
    "strangers take a server's last open file": "a server that ends, and no number that is released",
    "text may be as deep as it likes": ADMISSION,
    "a message may be as deep as it likes": ADMISSION,
    "a question over Flower's link is done twice": LINK,
    "an instruction is handled before it is written down": LINK,
    "a reply that comes twice counts twice": LINK,
    "gRPC is given another certificate at once": "a link that crashes, and no number that is released",
    "records are trained without measuring that they are apart": PRECONDITION,
    "protect accepts any delta": "the audit's own run asks for no such thing",
    "protect accepts an adjacency that its population contradicts": "the audit's own run asks for no such thing",
    "a ledger of protect lies where the process works": "a ledger's matter: each sum has the noise that was planned",
    "protect forgets the cap of whoever owns the data": "a ledger's matter: each sum has the noise that was planned",
    "protect tells how many were drawn in secret": "leaves beside the sum, where an audit of sums does not look",
    "protect pays for rounds that nobody answers": "a ledger's matter: each sum has the noise that was planned",
    "more clients take part than a delta was weighed for": "the audit's own run asks for no such thing",
    "the log tells which cohorts were empty": "leaves beside the sum, where an audit of sums does not look",
    "a secret of the environment is published with its run": "leaves beside the sum, where an audit of sums does not look",
    "who was drawn is told to everybody": "leaves beside the sum, where an audit of sums does not look",
    "everybody may read the operator's file": "leaves beside the sum, where an audit of sums does not look",
    "the mean is divided by a hidden number of clients": "leaves beside the sum, where an audit of sums does not look",
    "records are planned as if nothing were spent": "a ledger's matter: each sum has the noise that was planned",
    "a run goes on though every client has refused": "a ledger's matter: each sum has the noise that was planned",
    "changed data begin a new budget": "a ledger's matter: each sum has the noise that was planned",
    "a batch is never full": PRECONDITION,
    "an embedding writes to its own weights": PRECONDITION,
    "what a step writes into a parameter passes": PRECONDITION,
    "a coin of a layer falls on one side": PRECONDITION,
    "a collate function that mixes examples passes": PRECONDITION,
    "clients' data are not looked at before round 1": CONFIGURED,
    "hooks that see a part of a gradient are taken": PRECONDITION,
    "a dimension as long as the batch is taken for it": PRECONDITION,
    "arguments of one's own task are not checked": CONFIGURED,
    "a loss is not measured": PRECONDITION,
    "a loss that stands alone is measured on one batch": PRECONDITION,
    "what a step leaves behind is not looked at": PRECONDITION,
    "a model remembers one client for the next": PRECONDITION,
    "an optimizer carries one client's state to the next": CARRIED,
    "text passes for a number in a configuration": CONFIGURED,
    "rules between keys of a configuration are not looked at": CONFIGURED,
    "what is frozen travels": "more numbers leave, all of them clipped and noised as claimed",
    "the p-value of a secret draw is shown": "it is told beside the sums, and changes none",
    "an alarm tells how many were drawn in secret": "it is told beside the sums, and changes none",
    "a packed base travels": "more numbers leave, all of them clipped and noised as claimed",
    "a base that training moved stays in the process": "what one client leaves to the next is in no sum that an audit sees",
    "metrics leave beside the sum": "leaves beside the sum, where an audit of sums does not look",
    "what fits one budget fits every other": BOOKS,
    "of many real clients some are not looked at before round 1": CONFIGURED,
    "a client that was not looked at before round 1 is taken as it is": CONFIGURED,
    "a ledger of a client that the run did not note is left out": REPORTED,
    "coins of a large population come up at another rate": LARGE,
    "a cycle's rounds are paid once a run": "an event that is wrong in plan and ledger alike; audit=full is refused for this cohort",
    "the coin of a turn is accounted at the rate of all rounds": "an event that is wrong in plan and ledger alike; audit=full is refused for this cohort",
    "bands reach from one turn into the next": "a precondition: no plan asks for it",
    "the ledger tells who was drawn in secret": "what a file tells, which no sum shows",
    "fresh noise after a resume": "a round that is done again after a crash, and whose first sum no checkpoint kept",
    "a row of noise used twice": "a round that is done again after a crash, and whose first sum no checkpoint kept",
    "ledger not fsynced": BOOKS,
    "ledger reset on reinstall": BOOKS,
    "a device releases without a reservation": BOOKS,
    "an auditor's script takes a vector that is exchanged for one that is left out": BOOKS,
    "verify takes what a record has lost by sums of clients as stated": BOOKS,
    "sums of whole clients spend nothing of records' budgets here": BOOKS,
    "a plan for records forgets sums of whole clients": BOOKS,
    "a device plans for records as if sums of its whole client were free": BOOKS,
    "a run of both units is charged to its records twice": BOOKS,
    "a record pays for its client's sum as the client does": BOOKS,
    "a secret draw hides an exchanged vector as it hides the client": BOOKS,
    "a device's records pay nothing for a sum of clients": BOOKS,
    "records without a ledger have no budget": BOOKS,
    "earlier releases of a client are not charged to its records": BOOKS,
    "a sum of what records were charged for is charged to them again": BOOKS,
    "a second client with the same records is free": BOOKS,
    "a cap is not asked for": BOOKS,
    "all steps of Opacus are charged as one": OPACUS,
    "noised gradients that nobody has paid for stay": OPACUS,
    "a strategy object keeps what a run left in it": MEMORY,
    "Opacus' noise may come from a seed": OPACUS,
    "a client's ledger can be shed": BOOKS,
    "noise opened to fewer survivors than it is for": SERVER,
    "noise opened before a quorum has signed": SERVER,
    "survivors that nobody has checked": SERVER,
    "a hybrid key of X25519 alone": SERVER,
    "survivors not counted before a sum is opened": SERVER,
    "opened twice for one reservation": SERVER,
    "an opened sum that nobody weighs": MEMBER,
    "a search that never halves": MEMBER,
    "a search that forgets once it is calm": MEMBER,
    "a member of any name": MEMBER,
    "an evaluation's search is forgotten": MEMBER,
    "one member that declines ends a search": MEMBER,
    "an audit remembers a round that is not kept": ITSELF,
    "what a member says of its noise counts without limit": MEMBER,
    "a part whose sum nobody weighs": MEMBER,
    "a deal whose degree nobody checks": MEMBER,
    "a share that its holder does not check": MEMBER,
    "a complaint that is believed without a check": MEMBER,
    "a secret disclosed for a deal that nobody signed": MEMBER,
    "a revealed share that nobody checks": MEMBER,
    "shares joined by weights that everybody knows": MEMBER,
    "shares of few believed together": MEMBER,
    "a seed that nobody holds against its commitment": MEMBER,
    "wrong shares counted among answers that are enough": MEMBER,
    "a charge before the check of shares": MEMBER,
    "a node that opens one round again": SERVER,
    "a vector's spec taken from the server": SERVER,
    "a quorum's draw counts as secret": "when a round ends tells who took part, and an audit of sums does not look there",
    "a sum below the quorum is released": "as noised as one above it",
    "equal audit scores ordered by membership": ITSELF,
    "an audit's t test that never rejects": ITSELF,
    "an audit's p-value halved": ITSELF,
    "an audit's threshold picked once the coins are known": ITSELF,
    "an audit that leaves the books to the ledger": ITSELF,
    "an audit takes an earlier run for what this one was charged": ITSELF,
    "canary records all scored alike": ITSELF,
    "canary records scored as if every batch held them": ITSELF,
    "an audit's commitment gives its coins away": ITSELF,
    "an audit's chi-square on wrong degrees": ITSELF,
    "an audit that counts the direction it looks away from": ITSELF,
    "Fisher's method without its pooling": ITSELF,
    "a callback sees a private value": WATCHED,
    "a promise of no use is not refused on real data": PLANNED,
    "one of several runs takes the whole budget": PLANNED,
    "a server goes on after an alarm": ITSELF,
    "audit forgets delta": ITSELF,
    "the whole budget of false alarms spent at every look": ITSELF,
    "what confirms a free check stops no run": ITSELF,
    "audit of known rounds under amplification": ITSELF,
    "audit misses reused noise where updates move": ITSELF,
}


def row(name: str, tree: Path) -> str:
    """Apply one mutation to the copy, run it, and return what its audit says."""
    if name in BEYOND:
        return f"| {name} | - | {BEYOND[name]} |"
    mutation = MADE["MUTATIONS"][name]
    file = tree / mutation.file
    source = file.read_text()
    if source.count(mutation.before) != 1:
        return f"| {name} | - | the mutation no longer fits the code |"
    file.write_text(source.replace(mutation.before, mutation.after))
    command = ["timeout", "-k", "10", str(MOST_SECONDS), sys.executable, "-B", "-m", "fedveil", "simulate"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            ran = subprocess.run(
                [*command, "--json", "audit=full", f"hydra.run.dir={folder}/run", *RUNS[name]],
                env={**os.environ, "PYTHONPATH": str(tree.parent)},
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
    finally:
        file.write_text(source)
    why = f": {UNSEEN[name]}" if name in UNSEEN else ""
    return f"| {name} | {ran.returncode} | {_said(ran)}{why} |"


def _said(ran: subprocess.CompletedProcess[str]) -> str:
    if ran.returncode == TIMED_OUT:
        return f"did not end within {MOST_SECONDS} s"
    said = ran.stdout.strip().splitlines()[-1:] or [""]
    if not said[0].startswith("{"):
        return (ran.stderr.strip().splitlines() or ["?"])[-1]
    result = json.loads(said[0])
    if (audit := result.get("audit")) is None:
        return result["reason"]
    alarms = [f"{a['level']} {a['test']} round {a['round']} ({a['p_value']:.1g})" for a in audit["alarms"]]
    return ", ".join(alarms) or audit["verdict"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        copied = Path(made) / "fedveil"
        for room in MADE["ROOMS"]:
            shutil.copytree(ROOT / room, copied / room, ignore=shutil.ignore_patterns("__pycache__"))
        for each in (*ROOT.glob("*.py"), ROOT / "py.typed"):
            shutil.copy(each, copied / each.name)
        print("| mutation | exit code | alarms, or the verdict |\n|---|---|---|")
        for each in sys.argv[1:] or (*RUNS, *BEYOND):
            print(row(each, copied), flush=True)
