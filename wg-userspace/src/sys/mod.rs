//! Clock, randomness, affinity, memory mappings: the only room that calls libc.
