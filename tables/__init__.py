"""Extensions of tables: sources of rows, kinds of label, statistics of models and intervals, found by name."""
