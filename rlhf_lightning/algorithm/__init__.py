"""The injected parts of PPO: each option of the field lives on the small object that it belongs to."""
