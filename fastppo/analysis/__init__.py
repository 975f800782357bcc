"""Tools that look at runs and machines: bench, study, report, diff, doctor, verify-env, verify-resume, NaN replay."""
