"""What several test files share. No test imports from another test."""
