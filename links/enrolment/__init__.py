"""Port on which devices with a token enrol: TLS without a client certificate, one question per connection."""
