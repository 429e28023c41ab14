//! Benchmarks of Tidegate; each file of `benches/` answers the question in its first line.
