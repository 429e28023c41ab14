//! What the device is: its key and peers.
