"""What can be known of a training step from its compiled program, without running it."""
