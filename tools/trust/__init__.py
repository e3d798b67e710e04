"""What is claimed of trust, measured: kills, hostile files, fuzzing, leaks."""
