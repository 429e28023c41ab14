//! The handshake (whitepaper, section 5.4).
