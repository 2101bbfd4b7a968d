"""The processes of a run: who starts them, where each stands, how they meet and how they fail."""
