"""Language models that clients fine-tune on their own texts: `task=text`."""
