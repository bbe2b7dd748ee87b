"""What became of a model: samples, their statistics, and a report that shows them."""
