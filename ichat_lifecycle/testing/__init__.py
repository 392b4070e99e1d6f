"""Fakes of every port, and an event loop whose time jumps: minutes of life cost milliseconds."""
