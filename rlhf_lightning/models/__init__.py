"""The networks: causal language models, and models with one scalar output per token."""
