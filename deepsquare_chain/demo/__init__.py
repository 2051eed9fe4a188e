"""The scripted story of `deepsquare demo`: one grid, from submission to audit."""
