//! Loads, attaches and detaches the kernel side; one typed handle per map.
