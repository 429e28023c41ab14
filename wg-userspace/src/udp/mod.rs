//! Ordinary UDP sockets on the listen port.
