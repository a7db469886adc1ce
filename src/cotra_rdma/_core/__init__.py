"""Values and rules that every layer shares: checks of queries, memory regions, exact sums, ways to stop."""
