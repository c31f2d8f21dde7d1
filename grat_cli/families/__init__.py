"""What is known of each model family, one file each."""
