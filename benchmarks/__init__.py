"""Measurements. Each module is a program, and its docstring says how to run it."""
