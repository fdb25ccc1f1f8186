"""What verifying is made of: coverage, structure, archives, blobs, and what was found."""
