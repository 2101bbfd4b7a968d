"""What is asked: the schema of a job, how one is read, and every error of the toolkit. No torch."""
