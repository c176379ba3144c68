"""Links between a server and its devices, both ends of each; they transport messages and are independent of privacy."""
