//! Seals and opens batches of packets.
