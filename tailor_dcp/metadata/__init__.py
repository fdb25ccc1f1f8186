"""What a checkpoint's ``.metadata`` says, read without trusting the file."""
