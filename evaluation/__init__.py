"""The parts of the evaluation."""
