"""The scenario of `deepsquare demo`: one grid, from submission to audit."""
