//! A peer's keypairs, counters, replay window and timers.
