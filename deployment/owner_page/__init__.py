"""Page of a device's owner, on this machine only: what the server asks for, what was spent, and the owner's decisions."""
