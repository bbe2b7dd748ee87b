"""What a run will need of memory and time, told from its config."""
