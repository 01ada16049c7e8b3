"""The training of one subject: the step, the job, the bank, and what is loaded once for all subjects."""
