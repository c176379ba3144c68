"""Names of the files in a run folder. No package is imported, so that a verifier does not need the run's dependencies."""

from pathlib import Path

CONFIG = "config.yaml"  # written last: a folder with this file has a run to continue
SAVED = "run.json"
SINGLY = "singly"  # key of SAVED: equal records are held out one by one; runs of earlier releases lack it
METRICS = "metrics.jsonl"
OPERATOR = "operator.jsonl"  # details of rounds that only a trusted server may read
FOR_OPERATOR = "operator"  # folder of the report that only the operator may read
BLAME = "blame.jsonl"  # evidence against members at fault, one line for each attempt at a sum
ROSTERS = "rosters.jsonl"  # of real clients: the eligible ones, and the first round with this roster
RESULT = "result.json"
PERSONAL = "personal"  # folder of what simulated clients keep of their own models
CLIENTS_LOG = "clients.log"  # errors of clients on this machine
MODEL = "model.safetensors"
BASE = "base.json"  # hash of what every client has of the model already, which no checkpoint and no message holds
INTERVALS = "intervals.safetensors"  # what intervals of predictions need, of a linear model of tables
CURVE = "curve.svg"
AUDIT_ROWS = "audit.npy"
AUDIT_TERMS = "audit.json"
AUDIT_KEY = "audit.key"
MANIFEST = "manifest.json"
FAREWELL = "farewell.json"  # bytes of the final model and of receipts, sent after the run was closed
RECEIPTS = "receipts.json"  # from the devices, after the last round
WITNESSES = "witnesses.json"  # co-signatures of the server's log, which contains the manifest
TIME_STAMP = "manifest.tsr"  # of the manifest, by an authority of RFC 3161
# Files that `fedveil report` writes about a run, and ASSESSMENT, which the organisation adds.
REPORT, PAGE, CARD, ASSESSMENT = "report.json", "report.html", "CARD.md", "assessment.yaml"
MATERIALS = "bom.cdx.json"
QUESTIONS = "questions"  # folder of answers to questions, in a server's folder
SCALING = "scaling.json"  # answer by which a run scales its inputs, if the run sent that question
OF_RECORDS = "records"  # folder in QUESTIONS: ledger of questions with record-level privacy
OF_ANSWERS = "report"  # folder in QUESTIONS: REPORT and PAGE, apart from answers, which users name


def locate_ledger(folder: Path, path: str) -> Path:
    """Return the path of a ledger in a run's result: in the run folder, which may have moved, else the recorded path."""
    in_folder = folder / Path(path).name
    return in_folder if in_folder.exists() else Path(path)
