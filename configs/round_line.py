"""Prefixes of the numbers in a round's line that are no metric of the model as such."""

AUDIT = "audit/"  # what the canaries say
TRAIN = "train/"  # what the private sum says of training
AT_CLIENTS = "clients/"  # what clients measured on their own records
GROUPS = "groups/"  # of one group of people, each "attribute=word/figure"
