"""What each strategy of CIR is worth: runs with one of them off, their table and figure."""
