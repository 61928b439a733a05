"""Other ways to make weights small, to measure ours against: one file a method."""
