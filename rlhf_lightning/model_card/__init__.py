"""The model card: README.md of an exported model, made of what the run has recorded and of nothing else."""
