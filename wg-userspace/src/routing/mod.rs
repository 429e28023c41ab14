//! Allowed IPs: which peer owns an address.
