"""Many runs of one job: the session that makes them, and the verdict on each."""
