"""The commands for people in a terminal: they find workers, ask them and show what they say."""
