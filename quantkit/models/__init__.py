"""What is known of an architecture, found by structure."""
