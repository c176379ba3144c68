"""Port on which devices that hold a token enrol: TLS without a client's certificate, one question a connection."""
