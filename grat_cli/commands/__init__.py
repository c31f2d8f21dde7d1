"""What people type: each command parses, calls and prints."""
