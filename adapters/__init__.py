"""Adapters: programs written for other frameworks, under this one's accounting."""
