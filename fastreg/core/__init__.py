"""What all rooms use: types, dtypes, strengths, layouts and checks. It imports from no other room."""
