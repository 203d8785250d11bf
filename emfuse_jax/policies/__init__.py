"""Policies: learners that act."""
