"""Statistics of questions: a client's contribution from its rows, and the estimate with an interval from the noisy sum."""
