"""The parts of the training recipe."""
