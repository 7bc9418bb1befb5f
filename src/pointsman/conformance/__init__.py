"""Black-box tests for any endpoint picker that speaks ext_proc."""
