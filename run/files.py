"""Files of a run folder, by name; it imports no package, so that a verifier does not need those that made the run."""

from pathlib import Path

CONFIG = "config.yaml"  # written last, so that where it lies there is a run to continue
SAVED = "run.json"
SINGLY = "singly"  # key of SAVED: equal records are held out one by one; runs of earlier releases lack it
METRICS = "metrics.jsonl"
OPERATOR = "operator.jsonl"  # what a trusted server alone may know of its rounds
FOR_OPERATOR = "operator"  # folder of the report that only the operator may read
BLAME = "blame.jsonl"  # evidence against members that are named, a line for each attempt at a sum
ROSTERS = "rosters.jsonl"  # of real clients: who could take part, from which round on
RESULT = "result.json"
CLIENTS_LOG = "clients.log"  # errors of clients of this machine
MODEL = "model.safetensors"
CURVE = "curve.png"
AUDIT_ROWS = "audit.npy"
AUDIT_TERMS = "audit.json"
AUDIT_KEY = "audit.key"
MANIFEST = "manifest.json"
FAREWELL = "farewell.json"  # bytes of the final model and of receipts, which go once the run was closed
RECEIPTS = "receipts.json"  # of the devices, given when the run was over
WITNESSES = "witnesses.json"  # co-signatures of the server's log, which holds the manifest
TIME_STAMP = "manifest.tsr"  # of the manifest, by an authority of RFC 3161
# Files that `fedveil report` makes of a run, and the one that the organisation adds.
REPORT, PAGE, CARD, ASSESSMENT = "report.json", "report.html", "CARD.md", "assessment.yaml"
MATERIALS = "bom.cdx.json"
QUESTIONS = "questions"  # folder of answers in a server's, beside its runs
SCALING = "scaling.json"  # the answer by which a run scales its inputs, where it asked for one
OF_RECORDS = "records"  # folder, in one of answers, of the ledger of questions that hide records
OF_ANSWERS = "report"  # folder of REPORT and PAGE in one of answers, whose names are the askers'


def locate_ledger(folder: Path, path: str) -> Path:
    """Return where a ledger that a run's result names lies: in the run's folder, which may have moved, or at its path."""
    in_folder = folder / Path(path).name
    return in_folder if in_folder.exists() else Path(path)
