//! Addresses, routes and links of the host, by netlink.
