"""What makes, checks and installs."""
