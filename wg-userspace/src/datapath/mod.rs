//! The workers: pinned threads that move batches of packets.
