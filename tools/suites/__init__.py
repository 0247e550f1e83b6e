"""What tools/benchmark.py measures: the step of each toolkit with each method, and the core's losses and bank."""
