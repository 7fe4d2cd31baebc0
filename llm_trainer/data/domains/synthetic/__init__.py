"""Exercises with worked answers, generated from a seed."""
