"""Links between a server and its devices, both ends of each; they carry messages and know nothing of privacy."""
