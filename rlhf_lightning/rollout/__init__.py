"""Prompts in; responses, scores and log-probabilities out."""
