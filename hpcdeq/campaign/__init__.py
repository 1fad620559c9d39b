"""Many runs for one question: what a comparison is to run, and running it."""
