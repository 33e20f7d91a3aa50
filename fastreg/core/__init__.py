"""Types, dtypes, strengths, layouts and checks that all folders use. This folder imports from no other folder."""
