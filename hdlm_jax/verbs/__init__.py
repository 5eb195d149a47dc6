"""The verbs of the command line: each module holds its flags and one call."""
