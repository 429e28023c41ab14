//! The socket protocol of wg(8).
