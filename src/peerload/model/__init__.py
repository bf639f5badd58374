"""What is held, wanted and offered: values. Standard library and NumPy only."""
