"""Fault injection: many small real trainings while processes are killed, and checks from outside of the results."""
