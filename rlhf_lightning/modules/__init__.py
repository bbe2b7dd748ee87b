"""The LightningModules: hooks and wiring, no formula."""
