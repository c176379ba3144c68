"""Links that carry messages between a server and its devices; they know nothing of privacy."""
