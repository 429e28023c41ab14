//! Tidegate's tasks.

fn main() {}
