//! Reading and writing Ethernet, IPv4, IPv6 and UDP headers; checksums.
