"""Bayesian information: what an example contributed to resolving the uncertainty of a prediction."""
