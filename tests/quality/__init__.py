"""The quality tier: families of data, and how recall on them is measured. `bench/` uses both."""
