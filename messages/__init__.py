"""Messages between a server and its clients, each with its writer and its reader, and Flower's private names."""
